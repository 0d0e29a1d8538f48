"""`vortex bench compare`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..device import resolve_device
from .compare import Row, run, table

console = Console(stderr=True)


def compare(
    model: Annotated[
        Path | None, typer.Option(help="A folder in the diffusers layout. [default: random weights, real size]")
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="Sides of the pictures; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each contender and size.")] = 30,
    comfyui: Annotated[Path | None, typer.Option(help="A ComfyUI tree, to time its Flux forward too.")] = None,
    device: Annotated[str | None, typer.Option(help="[default: the first CUDA device, else the CPU]")] = None,
) -> None:
    """Time Vortex and its peers on the same weights and noise, in one process. Ends with one line of JSON."""
    logging.basicConfig(level=logging.WARNING)

    def report(row: Row) -> None:
        console.print(f"{row.contender}, {row.width} x {row.height}: {1e3 * row.picture.mean:.1f} ms")

    sizes = [(side, side) for side in size or (512, 1024)]
    result = run(model, device=resolve_device(device), sizes=sizes, samples=samples, comfyui=comfyui, on_row=report)
    console.print(table(result))
    for name, card in result.card.items():
        console.print(
            f"{name}: {card['step_flops'] / 1e12:.1f} TFLOP a step, of which {card['attention_flops'] / 1e12:.1f} in "
            f"attention; weights {card['nf4_bytes'] / 1e9:.2f} GB in NF4, {card['bf16_bytes'] / 1e9:.2f} GB in bf16"
        )
    typer.echo(result.as_json())


if __name__ == "__main__":
    typer.run(compare)
