"""What every command shares: its console, its options for a model's files, errors as sentences, progress."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import VortexError, VortexInputError, VortexWarning

if TYPE_CHECKING:
    from .engine import Engine

console = Console(stderr=True)
EXIT_USAGE, EXIT_CANCELLED = 2, 130

Clip = Annotated[Path | None, typer.Option(help="CLIP's text encoder, for a model without: clip_l.safetensors.")]
T5 = Annotated[Path | None, typer.Option(help="T5's encoder, for a model without: t5xxl_fp16.safetensors.")]
Vae = Annotated[Path | None, typer.Option(help="VAE, for a model without: ae.safetensors.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where quantized weights are kept. [default: $VORTEX_CACHE or the user's cache folder]"),
]
Vram = Annotated[
    float | None,
    typer.Option(
        "--vram",
        help="GB (10^9 bytes) of VRAM that torch may take at its peak, everything included; what does not fit streams "
        "from host memory. [default: 6.5, or what a smaller card has but 1]",
        show_default=False,
    ),
]

Mode = Annotated[
    str,
    typer.Option(help="'fast': products in fp8 where the card has them, else exact; 'exact': products in 16 bits."),
]


class plain_errors:
    """Errors and warnings as sentences; a traceback is for bugs."""

    def __enter__(self) -> None:
        self._show = warnings.showwarning
        warnings.simplefilter("always", VortexWarning)
        warnings.showwarning = self._warn

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        warnings.showwarning = self._show
        if isinstance(error, VortexError):
            console.print("[red]error:[/]", str(error), highlight=False, markup=True)
            raise typer.Exit(EXIT_USAGE if isinstance(error, VortexInputError) else 1) from error
        if isinstance(error, OSError):
            console.print("[red]error:[/]", str(error), highlight=False)
            raise typer.Exit(1) from error
        if isinstance(error, KeyboardInterrupt):
            console.print("cancelled; nothing was written")
            raise typer.Exit(EXIT_CANCELLED) from error

    def _warn(self, message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, VortexWarning):
            console.print("[yellow]note:[/]", str(message), highlight=False)
        else:
            self._show(message, category, *rest, **more)


def progress_bars() -> Progress:
    """Bars with a description, a `count` field and the time that passed."""
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
    )


def byte_count(progress: Progress, what: str) -> Callable[[int, int], None]:
    """A new bar that counts bytes: `report(done, total)`."""
    task = progress.add_task(what, total=None, count="")

    def report(done: int, total: int) -> None:
        count = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
        progress.update(task, completed=done, total=total, count=count)

    return report


def load_engine(progress: Progress, model: str, **options: Any) -> Engine:
    """`Engine.load` behind a bar."""
    report = byte_count(progress, "loading")
    from .engine import Engine  # seconds of imports: after the bar shows

    return Engine.load(model, on_progress=report, **options)


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of `WIDTHxHEIGHT`; None for both where there is none. Raises `VortexInputError`."""
    if size is None:
        return None, None
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise VortexInputError(f"--size must look like 512x512 (width x height), not {size!r}.")
    return int(width), int(height)
