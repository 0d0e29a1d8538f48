"""Options that several benchmark commands take."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from ..bench.verdict import EXIT_FAIL, EXIT_UNDECIDED, FAIL, PASS, UNDECIDED, Verdict, exit_code
from ..bench.workload import ITERATIONS, MAX_PROMPTS, PROMPTS, WARMUP, Workload
from ..errors import VortexInputError
from ..flux1.request import Request, check_choice, check_prompt
from ..flux1.spec import DEFAULT_STEPS, MIN_SIZE, MODES, QUANTIZATIONS
from ..utils.packages import missing, remedy
from ..utils.whole_files import check_file, check_folder
from .bench_output import homeless
from .terminal import (
    EXIT_CANCELLED,
    T5,
    CacheDir,
    Clip,
    Device,
    Model,
    Quantization,
    Size,
    Tokenizers,
    Vae,
    Vram,
    check_number,
    check_text,
    load_engine,
    out,
    parse_size,
    path_option,
    user_path,
)

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from .console import Bars, Grid

Steps = Annotated[int, typer.Option(help="Steps of a picture; schnell is made for 4.")]
Iterations = Annotated[int, typer.Option(min=1, help="Pictures that count.")]
Prometheus = Annotated[Path | None, path_option(help="File to write in Prometheus' text format.")]
Log = Annotated[Path | None, path_option(help="File that gets one more JSON line for each picture.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print nothing but the JSON line.")]

EXIT_CODES = (
    f"Exit codes: 0 pass, {EXIT_FAIL} fail, 2 bad usage, {EXIT_UNDECIDED} undecided, "
    f"{EXIT_CANCELLED} interrupted (what was measured is reported)."
)
MARKS = {PASS: ("PASS", "green"), FAIL: ("FAIL", "red"), UNDECIDED: ("UNDECIDED", "yellow")}


@dataclass(frozen=True, slots=True)
class Source:
    """Options: the model, and where and how it runs."""

    model: Model = "tiny"
    clip: Clip = None
    t5: T5 = None
    vae: Vae = None
    tokenizers: Tokenizers = None
    cache_dir: CacheDir = None
    device: Device = None
    vram: Vram = None
    mode: Annotated[
        str | None,
        typer.Option(help="'fast', 'exact', 'int8' or 'fp8', as `vortex generate` has them; fast where none is given."),
    ] = None
    quantization: Quantization = "nf4"

    def check(self) -> None:
        """Raise `VortexInputError` for an option out of range, before a model is loaded."""
        if self.mode is not None:
            check_choice("mode", self.mode, MODES)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_number("--vram", self.vram, above=0, most=1e6)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `Engine.load`, `model` included."""
        options = asdict(self)
        for name in ("mode", "tokenizers"):  # earlier revisions do not know these arguments
            if options[name] is None:
                del options[name]
        if self.model != "tiny":
            options["model"] = str(user_path(self.model))
        return options | {"vram_budget": options.pop("vram")}

    def load(self, progress: Bars) -> Engine:
        """Load the engine, with a progress bar."""
        return load_engine(progress, **self.options)


@dataclass(frozen=True, slots=True)
class Work:
    """Options: the pictures, and how many."""

    size: Size = None
    steps: Steps = DEFAULT_STEPS
    iterations: Iterations = ITERATIONS
    warmup: Annotated[int, typer.Option(min=0, help="Pictures drawn before them, which do not count.")] = WARMUP
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help=f"Prompts to rotate over, up to {MAX_PROMPTS}; five simple ones where none is given."
        ),
    ] = None

    def check(self) -> None:
        """Raise `VortexInputError` for an option out of range, before a model is loaded."""
        self.workload(MIN_SIZE)
        for prompt in self.prompt or ():
            check_text("A prompt", prompt)
            check_prompt(prompt)

    def workload(self, native: int, cold: int = 0) -> Workload:
        """The pictures to draw with a model whose native side is `native`."""
        width, height = check_size(self.size, self.steps) or (native, native)
        prompts = tuple(self.prompt or PROMPTS)
        return Workload(width, height, self.steps, self.iterations, self.warmup, cold, prompts)


@dataclass(frozen=True, slots=True)
class Results:
    """Options: where the figures go."""

    output: Annotated[
        Path | None,
        path_option("--output", "-o", help="Folder for report.json, samples.csv and plots as PNG and SVG."),
    ] = None
    as_json: AsJson = False

    def check(self) -> None:
        """Raise `VortexInputError` for a folder that cannot be written, before anything is measured."""
        if self.output is not None:
            check_output(self.output, "--output")
            check_plots()

    def finish(
        self,
        figures: Mapping[str, Any],
        tables: Sequence[Grid],
        verdicts: Sequence[Verdict],
        interrupted: bool = False,
    ) -> NoReturn:
        """Print tables, verdicts and the JSON line. Raises `typer.Exit` with the exit code."""
        if not self.as_json:
            for table in tables:
                out().print(table)
            for verdict in verdicts:
                out().say(MARKS[verdict.state], f"  {verdict.what}: {verdict.detail}")
        code = EXIT_CANCELLED if interrupted else exit_code(verdicts)
        typer.echo(homeless(json.dumps({**figures, "exit_code": code})))
        raise typer.Exit(code)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer takes it: a parameter that is a dataclass becomes one option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        kind = groups.get(parameter.name)
        if kind is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=Parameter.KEYWORD_ONLY))
            continue
        own = get_type_hints(kind, include_extras=True)
        parameters += [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=own[field.name])
            for field in fields(kind)
        ]

    @wraps(command)
    def flat(**options: Any) -> None:
        made = {
            name: kind(**{field.name: options.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**made, **options)

    flat.__dict__["__signature__"] = Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def check_size(size: str | None, steps: int) -> tuple[int, int] | None:
    """Width and height of `--size`, checked before a model is loaded. Raises `VortexInputError`."""
    width, height = parse_size(size)
    Request(seed=0, height=height or MIN_SIZE, width=width or MIN_SIZE, steps=steps, batch_size=1)
    return None if width is None or height is None else (width, height)


def check_output(folder: Path, option: str) -> None:
    """Raise `VortexInputError` for a folder that cannot be made or written to. Makes nothing."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise VortexInputError(f"{option} must be a folder, and {place} is a file.")
    check_folder(place)


def check_plots() -> None:
    """Raise `VortexInputError` where matplotlib is missing or broken, before anything is measured."""
    why = missing("matplotlib.figure")
    if why is not None:
        raise VortexInputError(
            f"--output draws plots with matplotlib, which {why}. Try `{remedy('matplotlib')}`, or leave --output out."
        )


def check_files(*paths: Path | None) -> None:
    """Raise `VortexInputError` for a file that cannot be written, before anything is measured."""
    for path in paths:
        if path is not None:
            check_file(path)
