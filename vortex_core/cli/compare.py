"""`vortex bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.verdict import milliseconds
from ..errors import GB, VortexInputError
from ..flux1.spec import DEFAULT_STEPS
from ..utils.packages import need
from . import interrupt
from .bench_options import Results, check_size, grouped
from .bench_output import write_folder
from .terminal import err, grid, plain_errors, source_option, user_path

if TYPE_CHECKING:
    import torch

    from ..bench.contest import Result, Row
    from .console import Grid

NEEDED = 31 * GB  # of VRAM: 24 of 16-bit weights, and an engine beside them


@grouped
def compare(
    results: Results,
    model: Annotated[
        str | None, typer.Option(help="tiny, or a folder in the diffusers layout. [default: random weights, real size]")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT; may be repeated. [default: 512x512 and 1024x1024]")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each contender and size.")] = 30,
    comfyui: Annotated[Path | None, source_option(help="A ComfyUI tree, to time its Flux forward too.")] = None,
    device: Annotated[str | None, typer.Option(help="[default: the first CUDA device, else the CPU]")] = None,
    allocator: Annotated[
        str | None, typer.Option(help="native, or cudaMallocAsync as in ComfyUI. [default: the process' own]")
    ] = None,
) -> None:
    """Time Vortex and its peers on the same weights and noise, in one process. Ends with one line of JSON.

    The peers with 16-bit weights take 31 GB of VRAM. Needs diffusers and bitsandbytes.
    """

    def report(row: Row) -> None:
        median = milliseconds(row.picture.percentile(50).seconds)
        err().say(f"{row.contender}, {row.width} x {row.height}: {median}, {row.peak / GB:.2f} GB")

    with plain_errors():
        results.check()
        for package in ("diffusers", "bitsandbytes.nn"):
            need(package, "A comparison with peers")
        sizes = [check_size(text, DEFAULT_STEPS) for text in size or ("512x512", "1024x1024")]
        if comfyui is not None and not comfyui.is_dir():
            raise VortexInputError(f"There is no ComfyUI tree at {comfyui}.")
        from ..bench.allocator import again, ensure_allocator
        from ..bench.contest import run
        from ..bench.plots import compare_plot
        from ..device.select import resolve_device

        interrupt.raises()
        ensure_allocator(allocator, again())
        where = resolve_device(device)
        folder = source(model, where)
        shapes = [(height, width) for width, height in filter(None, sizes)]
        result = run(folder, device=where, sizes=shapes, samples=samples, comfyui=comfyui, on_row=report)
        found = result.figures()
        if results.output:
            write_folder(results.output, found, lambda: {"compare": compare_plot(result)})
        results.finish(found, [table(result), floors(result)], [])


def source(model: str | None, device: torch.device) -> Path | None:
    """The model's folder; None for random weights. Raises `VortexInputError` for another layout, or too little VRAM."""
    from ..checkpoint.bundle import path_of
    from ..device.vram import available

    if model is not None:
        folder = path_of(model if model == "tiny" else user_path(model))
        if not (folder / "model_index.json").is_file():
            raise VortexInputError(f"{folder} is no folder in the diffusers layout: it has no model_index.json.")
        return folder
    room = available(device)
    if room is None or room < NEEDED:
        found = "there is no GPU here" if room is None else f"{device} has {room / GB:.1f} GB left"
        raise VortexInputError(
            f"Peers with 16-bit weights of the real size take {NEEDED / GB:.0f} GB of VRAM, and {found}. "
            "`--model tiny` compares them on the miniature."
        )
    return None


def table(result: Result) -> Grid:
    """A row for each contender and size."""
    title = f"{result.machine['device']}, torch {result.machine['torch']}"
    if result.machine["allocator"]:
        title += f", allocator {result.machine['allocator']}"
    made = grid("contender", "size", "P50", "P99", "a step", "decode", "peak", "latents off", title=title)
    for row in result.rows:
        figures = (row.picture.percentile(50), row.picture.percentile(99), row.step.percentile(50))
        times = [milliseconds(p.seconds) for p in (*figures, row.decode.percentile(50))]
        made.add_row(row.contender, f"{row.width} x {row.height}", *times, f"{row.peak / GB:.2f} GB", f"{row.off:.4f}")
    for name, why in result.declined.items():
        made.add_row(name, "did not draw: " + why)
    return made


def floors(result: Result) -> Grid:
    """What a step costs at least, in any implementation."""
    made = grid("a step of", "TFLOP", "of them attention", "weights in NF4", "in bf16")
    for name, card in result.card.items():
        flops = [f"{card[kind] / 1e12:.1f}" for kind in ("step_flops", "attention_flops")]
        made.add_row(name, *flops, *(f"{card[kind] / GB:.2f} GB" for kind in ("nf4_bytes", "bf16_bytes")))
    return made
