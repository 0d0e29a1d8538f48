"""What all commands share: consoles, options for a model's files, errors as sentences, progress bars."""

from __future__ import annotations

import logging
import math
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import VortexError, VortexInputError, VortexWarning, quoted
from ..flux1.spec import MAX_SIZE, MIN_SIZE, SIZE_MULTIPLE
from ..utils.paths import expanded
from ..utils.printable import printable_lines
from . import interrupt

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from .console import Bars, Console, Grid

EXIT_USAGE, EXIT_CANCELLED = 2, interrupt.EXIT_CANCELLED


def user_path(text: str) -> Path:
    """A path as a shell reads it. Raises `typer.BadParameter` where `expanded` refuses it."""
    try:
        return expanded(text)
    except VortexInputError as error:
        raise typer.BadParameter(str(error)) from error


def path_option(*names: str, **options: Any) -> Any:
    """A `typer.Option` for a path."""
    return typer.Option(*names, parser=user_path, metavar="PATH", **options)


def source_option(**options: Any) -> Any:
    """A `typer.Option` for a path to read, or for the cache. An empty text is none, as in an environment variable."""
    return typer.Option(parser=lambda text: user_path(text) if text else None, metavar="PATH", **options)


Model = Annotated[
    str,
    typer.Option(
        help="'tiny' (bundled: simple coloured shapes), a FLUX.1-schnell diffusers folder, or a .safetensors or "
        ".gguf file."
    ),
]
Clip = Annotated[Path | None, source_option(help="CLIP's text encoder, for a model without: clip_l.safetensors.")]
T5 = Annotated[Path | None, source_option(help="T5's encoder, for a model without: t5xxl_fp16.safetensors.")]
Vae = Annotated[Path | None, source_option(help="VAE, for a model without: ae.safetensors.")]
Tokenizers = Annotated[
    Path | None,
    source_option(
        help="Folder with tokenizer/ and tokenizer_2/. [default: the model's own, else the Hugging Face cache's]"
    ),
]
CacheDir = Annotated[
    Path | None,
    source_option(help="Where quantized weights are kept. [default: $VORTEX_CACHE or the user's cache folder]"),
]
Vram = Annotated[
    float | None,
    typer.Option(
        "--vram",
        help="GB (10^9 bytes) of VRAM that torch may take at its peak, everything included. Weights that do not fit "
        "stream from host memory. [default: 6.5; on a smaller card its size less 1]",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="'cuda', 'cuda:1' or 'cpu'. [default: the GPU if any]")]
Size = Annotated[
    str | None,
    typer.Option(
        help=f"WIDTHxHEIGHT in pixels, multiples of {SIZE_MULTIPLE} from {MIN_SIZE} to {MAX_SIZE}. "
        "[default: the model's own]"
    ),
]
Quantization = Annotated[str, typer.Option(help="'nf4', or 'none' for 16-bit weights (24 GB at full size).")]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:STRENGTH]",
        help="Draw with a LoRA, such as style.safetensors:0.8; the strength is 1 by default and may be negative. "
        "May be given several times.",
        show_default=False,
    ),
]
Mode = Annotated[
    str,
    typer.Option(help="'fast': the card's fastest products in 8 bits, 'int8' or 'fp8', else 'exact': in 16 bits."),
]


@cache
def out() -> Console:
    """Standard output."""
    from .console import Console

    return Console()


@cache
def err() -> Console:
    """Standard error. There is one console for it, which keeps the bars below its lines."""
    from .console import Console

    return Console(stderr=True)


def grid(*columns: str, title: str = "") -> Grid:
    """An empty table."""
    from .console import Grid

    return Grid(*columns, title=title)


class plain_errors:
    """Shows errors and warnings as sentences. Only bugs give a traceback."""

    def __enter__(self) -> None:
        self._show = warnings.showwarning
        self._said: set[str] = set()
        warnings.simplefilter("always", VortexWarning)
        warnings.showwarning = self._warn
        interrupt.tally.begin(0)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        interrupt.ends()
        warnings.showwarning = self._show
        if isinstance(error, BrokenPipeError):
            return
        if isinstance(error, VortexError | OSError):
            err().say(("error:", "red"), " ", as_options(str(error)))
            raise typer.Exit(EXIT_USAGE if isinstance(error, VortexInputError) else 1) from error
        if isinstance(error, KeyboardInterrupt):
            err().say(interrupt.tally.sentence)
            raise typer.Exit(EXIT_CANCELLED) from error

    def _warn(self, message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, VortexWarning):
            self._show(message, category, *rest, **more)
        elif str(message) not in self._said:  # once, however many pictures it is about
            self._said.add(str(message))
            err().say(("note:", "yellow"), " ", as_options(str(message)))


OPTIONS = {
    "cache_dir": "--cache-dir", "clip": "--clip", "device": "--device", "t5": "--t5", "tokenizers": "--tokenizers",
    "vae": "--vae", "mode": "--mode", "quantization": "--quantization", "vram_budget": "--vram",
    "loras": "--lora",
}  # fmt: skip
# a name in backticks or a bare vram_budget, but no part of a path or of a quoted text
_ARGUMENT = re.compile(rf"(?<![\w/\\.='\"-])(?:`({'|'.join(OPTIONS)})`|vram_budget\b(?!=))")


def as_options(sentence: str) -> str:
    """A message of the library with the command's options in place of the library's arguments."""
    return _ARGUMENT.sub(lambda found: OPTIONS[found[1] or "vram_budget"], sentence)


class Lines(logging.Formatter):
    """Log lines that cannot steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def log_to_stderr(verbose: bool) -> None:
    """Show log lines on standard error: errors, and with `verbose` what is chosen and why."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, handlers=[handler])


def progress_bars() -> Bars:
    """Progress bars on standard error."""
    from .console import Bars

    return Bars(err())


def byte_count(progress: Bars, what: str) -> Callable[[int, int], None]:
    """A new bar that counts bytes: `report(done, total)`."""
    task = progress.add_task(what, total=None, count="")

    def report(done: int, total: int) -> None:
        count = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB"
        progress.update(task, completed=done, total=total, count=count)

    return report


def load_engine(progress: Bars, model: str | Path, **options: Any) -> Engine:
    """Call `Engine.load` with a progress bar."""
    report = byte_count(progress, "loading")
    from ..runtime.engine import Engine  # takes seconds to import, so the bar shows first

    def begin(done: int, total: int) -> None:
        interrupt.raises()  # not earlier: before this, more imports run on a thread that Ctrl-C cannot interrupt
        report(done, total)

    try:
        return Engine.load(model, on_progress=begin, **options)
    except VortexError:
        progress.remove_task(progress.task_ids[-1])  # the error's sentence replaces the bar
        raise


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of `WIDTHxHEIGHT`; None for both where there is none. Raises `VortexInputError`."""
    if size is None:
        return None, None
    sides = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", size)
    if sides is None:
        raise VortexInputError(f"--size must look like 512x512 (width x height), not {quoted(size)}.")
    return int(sides[1]), int(sides[2])


def check_text(name: str, text: str) -> None:
    """Raise `VortexInputError` for a text that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise VortexInputError(
            f"{name} is not UTF-8 at character {error.start + 1}: {quoted(text[error.start :][:20])}. Whatever wrote "
            "it uses another encoding; convert it first."
        ) from error


def check_number(
    name: str, value: float | None, *, above: float | None = None, least: float = -math.inf, most: float = 1e9
) -> None:
    """Raise `VortexInputError` unless `value` is `above` and from `least` to `most`. NaN is refused; None passes."""
    if value is None or (least <= value <= most and (above is None or value > above)):
        return
    wanted = f"above {above:g}" if above is not None else f"at least {least:g}" if math.isfinite(least) else "a number"
    raise VortexInputError(f"{name} must be {wanted} and at most {most:g}, not {value:g}.")
