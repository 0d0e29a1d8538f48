"""`vortex bench compare`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..device import resolve_device
from ..errors import GB
from ..terminal import console, plain_errors
from .options import Results, grouped
from .output import grid, milliseconds, write_folder

if TYPE_CHECKING:
    from .compare import Result


@grouped
def compare(
    results: Results,
    model: Annotated[
        Path | None, typer.Option(help="A folder in the diffusers layout. [default: random weights, real size]")
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="Sides of the pictures; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each contender and size.")] = 30,
    comfyui: Annotated[Path | None, typer.Option(help="A ComfyUI tree, to time its Flux forward too.")] = None,
    device: Annotated[str | None, typer.Option(help="[default: the first CUDA device, else the CPU]")] = None,
) -> None:
    """Time Vortex and its peers on the same weights and noise, in one process. Ends with one line of JSON.

    Takes 30 GB of VRAM for the peers with 16-bit weights, and needs diffusers and bitsandbytes.
    """
    from .compare import Row, run
    from .plots import compare_plot

    logging.basicConfig(level=logging.WARNING)

    def report(row: Row) -> None:
        median = milliseconds(row.picture.percentile(50).seconds)
        console.print(f"{row.contender}, {row.width} x {row.height}: {median}, {row.peak / GB:.2f} GB")

    with plain_errors():
        results.check()
        sizes = [(side, side) for side in size or (512, 1024)]
        result = run(model, device=resolve_device(device), sizes=sizes, samples=samples, comfyui=comfyui, on_row=report)
        found = result.figures()
        if results.output:
            write_folder(results.output, found, {"compare": compare_plot(result)})
        results.finish(found, [table(result), floors(result)], [])


def table(result: Result) -> Table:
    """A row for each contender and size."""
    title = f"{result.machine['device']}, torch {result.machine['torch']}"
    made = grid("contender", "size", "P50", "P99", "a step", "decode", "peak", "latents off", title=title)
    for row in result.rows:
        figures = (row.picture.percentile(50), row.picture.percentile(99), row.step.percentile(50))
        times = [milliseconds(p.seconds) for p in (*figures, row.decode.percentile(50))]
        made.add_row(row.contender, f"{row.width} x {row.height}", *times, f"{row.peak / GB:.2f} GB", f"{row.off:.4f}")
    for name, why in result.declined.items():
        made.add_row(name, "did not draw: " + why)
    return made


def floors(result: Result) -> Table:
    """What a step takes whoever computes it."""
    made = grid("a step of", "TFLOP", "of them attention", "weights in NF4", "in bf16")
    for name, card in result.card.items():
        flops = [f"{card[kind] / 1e12:.1f}" for kind in ("step_flops", "attention_flops")]
        made.add_row(name, *flops, *(f"{card[kind] / GB:.2f} GB" for kind in ("nf4_bytes", "bf16_bytes")))
    return made
