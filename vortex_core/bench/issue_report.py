"""One report of a machine and how fast it draws, to attach to an issue: no paths, no names, no prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..device.vram import peak as peak_of
from ..errors import GB
from ..flux1.spec import FluxSpec
from ..memory.planner import MemoryPlan
from ..utils.printable import printable
from ..utils.timeline import Timeline
from ..utils.timing import Latency, Percentile, synchronize
from . import cards, latency_report
from .anonymous import anonymous
from .latency_report import LatencyReport
from .machine import Hardware, Machine, hardware, machine, now
from .readings import PROCESS, Counters, counters
from .roofline import Prediction, predict
from .samples import describe, draw
from .workload import MINUTES, PROMPTS, REPORTED, Workload

if TYPE_CHECKING:
    from ..runtime.engine import Engine

SCHEMA = "vortex.bench.report/1"
SIDES = (512, 1024)  # pixels, for a model of the released size
COLD = 3  # pictures of new prompts
Size = tuple[int, int]  # width and height
Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one size took. `reserved`, `process`: peaks in bytes, torch's and the process' by NVML; None where unknown.

    `plan`: what was planned, None without a GPU. `predicted`: by a roofline, None for a card that it does not know.
    """

    latency: LatencyReport
    plan: MemoryPlan | None
    reserved: int | None
    process: int | None
    predicted: Prediction | None

    @property
    def series(self) -> dict[str, Latency]:
        """Statistics of whole pictures, by kind: `cached` and `cold` prompts."""
        return {kind: series.whole for kind, series in self.latency.series.items()}

    @property
    def median(self) -> float:
        """Seconds of a picture whose prompt is cached."""
        return self.series["cached"].percentile(50).seconds

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the parts of a picture, sums of medians, by the names that `mark` has but for a step's number."""
        parts: dict[str, float] = {}
        for name, phase in self.latency.series["cached"].phases.items():
            part = "steps" if name.startswith("step ") else name
            parts[part] = parts.get(part, 0.0) + phase.percentile(50).seconds
        if "cold" in self.series:
            parts["a new prompt adds"] = self.series["cold"].percentile(50).seconds - self.median
        return parts

    @property
    def state(self) -> dict[str, Any]:
        """The card meanwhile: its slowest and fastest clock, hottest, most power, and what held clocks down."""
        readings = [sample.reading for sample in self.latency.samples]

        def told(name: str) -> list[Any]:
            return [value for reading in readings if (value := getattr(reading, name)) is not None]

        return {
            "clocks": [min(told("clock"), default=None), max(told("clock"), default=None)],
            "temperature": max(told("temperature"), default=None),
            "power": max(told("power"), default=None),
            "throttled": sorted({reason for reasons in told("throttled") for reason in reasons}),
        }

    def figures(self) -> dict[str, Any]:
        """Everything, for JSON."""
        work, plan, predicted = self.latency.workload, self.plan, self.predicted
        return {
            "width": work.width,
            "height": work.height,
            "steps": work.steps,
            "series": {kind: latency.as_dict() for kind, latency in self.series.items()},
            "parts": self.parts,
            "seconds": [round(sample.seconds, 5) for sample in self.latency.samples if not sample.cold],
            "state": self.state,
            "plan": None if plan is None else {"peak": plan.peak, "breakdown": plan.breakdown, "copies": plan.kept},
            "reserved": self.reserved,
            "process": self.process,
            "predicted": None if predicted is None else predicted.figures(),
        }


@dataclass(frozen=True, slots=True)
class IssueReport:
    """All of it. `load` and `first` are seconds: until the model was there, and of the first picture."""

    when: str
    machine: Machine
    hardware: Hardware
    model: dict[str, str]
    precision: str
    reason: str
    load: float
    first: float
    drawn: tuple[Drawn, ...]
    interrupted: bool

    def figures(self) -> dict[str, Any]:
        """Everything, for JSON, without names and paths."""
        found = {
            "schema": SCHEMA,
            "when": self.when,
            "machine": self.machine.as_dict(),
            "hardware": asdict(self.hardware),
            "model": self.model,
            "precision": {"name": self.precision, "reason": self.reason},
            "load_seconds": self.load,
            "first_picture_seconds": self.first,
            "sizes": [drawn.figures() for drawn in self.drawn],
            "interrupted": self.interrupted,
        }
        return dict(anonymous(found))

    def markdown(self) -> str:
        """A text to paste into an issue, with the figures as JSON at its end."""
        figures = json.dumps(self.figures(), separators=(",", ":"))
        return "\n".join(
            (
                "### Vortex: report of a machine",
                "",
                *_table(("", ""), anonymous(list(_about(self)))),
                "",
                *_table(("", *(drawn.latency.workload.words for drawn in self.drawn)), _pictures(self.drawn)),
                "",
                f"<details><summary>JSON</summary>\n\n```json\n{figures}\n```\n\n</details>",
            )
        )


def run(
    load: Callable[[], Engine],
    device: torch.device,
    *,
    sizes: Sequence[Size] = (),
    pictures: int = REPORTED,
    minutes: float = MINUTES,
    on_picture: Callable[[int, int], None] | None = None,
) -> IssueReport:
    """Load an engine on `device` and draw with it, for about `minutes`. `sizes`: default 512 and 1024.

    After Ctrl-C the report has what was measured so far, if a picture was, and `interrupted` is True.
    """
    when, began = now(), time.perf_counter()
    engine = load()
    synchronize(device)
    loaded = time.perf_counter()
    released = engine.spec.flux == FluxSpec()
    sides = SIDES if released else (engine.native_size,)
    sizes = sizes or [(side, side) for side in sides]
    draw(engine, PROMPTS[0], 0, width=sizes[0][0], height=sizes[0][1])
    first = time.perf_counter() - loaded
    drawn: list[Drawn] = []
    for size in sizes:
        work = Workload(*size, iterations=pictures, warmup=1, cold=COLD)
        try:
            drawn.append(_draw(engine, work, 60 * minutes / len(sizes), on_picture))
        except KeyboardInterrupt:
            if not drawn:
                raise
            break
        if drawn[-1].latency.interrupted:
            break
    return IssueReport(
        when=when,
        machine=machine(device),
        hardware=hardware(device),
        model=describe(engine) | {"name": _name(engine.name, released=released)},
        precision=engine.precision,
        reason=engine.precision_reason,
        load=loaded - began,
        first=first,
        drawn=tuple(drawn),
        interrupted=len(drawn) < len(sizes) or drawn[-1].latency.interrupted,
    )


def _name(name: str, *, released: bool) -> str:
    """A model's name, which may be that of anyone's file, in words that tell nothing of it."""
    return name if name == "tiny-schnell" else "FLUX.1-schnell" if released else "a model of other sizes"


def _draw(engine: Engine, work: Workload, patience: float, on_picture: Callable[[int, int], None] | None) -> Drawn:
    device, cuda = engine.device, engine.device.type == "cuda"
    with Timeline[Counters](partial(counters, device)) as timeline, peak_of(device) as most:
        latency = latency_report.run(engine, work, on_picture=on_picture, patience=patience)
    process = max((moment.reading.get(PROCESS) or 0 for moment in timeline.moments), default=0)
    return Drawn(
        latency,
        engine.plan if cuda else None,
        most.reserved if cuda else None,
        process or None,
        _predicted(engine, work) if cuda else None,
    )


def _predicted(engine: Engine, work: Workload) -> Prediction | None:
    """The roofline's figures, for a model of the released size on a card that it knows."""
    found = torch.cuda.get_device_properties(engine.device)
    card = cards.find(found.name, found.total_memory)
    if card is None or engine.spec.flux != FluxSpec() or engine.precision not in card.precisions:
        return None
    size, share = (work.height, work.width), engine.plan.share_copied
    return predict(card, engine.spec, *size, engine.precision, steps=work.steps, copied=share)


def _table(head: Row, rows: Iterable[Sequence[str]]) -> list[str]:
    safe = ([printable(cell).replace("|", "\\|") for cell in cells] for cells in (head, ("---",) * len(head), *rows))
    return [f"| {' | '.join(cells)} |" for cells in safe]


def _about(report: IssueReport) -> Iterable[Row]:
    here, hard, model = report.machine, report.hardware, report.model
    capability = "" if hard.capability is None else f", compute capability {hard.capability}, {_gb(hard.vram)}"
    yield "device", f"{here.device}{capability}"
    if here.cuda is not None:
        yield "driver, CUDA, allocator", f"{here.driver or 'unknown'}, {here.cuda}, {here.allocator}"
    yield "host", f"{hard.system}; {hard.processor}, {hard.cores} cores, {_gb(hard.memory)}"
    packages = ", ".join(f"{name} {version}" for name, version in here.packages.items())
    yield "versions", f"vortex {here.vortex}, Python {here.python}, torch {here.torch}, {packages}"
    yield "model", f"{model['name']}, {model['quantization']}, {model['dtype']}, budget {model['vram_budget']}"
    yield "precision", f"**{report.precision}** ({report.reason})"
    yield "loading, first picture", f"{report.load:.1f} s, {report.first:.1f} s"


def _pictures(drawn: Sequence[Drawn]) -> Iterable[Row]:
    def row(name: str, cell: Callable[[Drawn], str]) -> Row:
        return (name, *map(cell, drawn))

    cached = [one.series["cached"] for one in drawn]
    yield "pictures", *(str(latency.count) for latency in cached)
    for i, percentile in enumerate(cached[0].percentiles):
        yield f"P{percentile.q:g}", *(_percentile(latency.percentiles[i]) for latency in cached)
    for part in dict.fromkeys(name for one in drawn for name in one.parts):
        yield row(part, lambda one, part=part: _seconds(one.parts.get(part)))  # type: ignore[misc]
    plans = [one.plan for one in drawn if one.plan is not None]
    if plans:
        yield "planned peak", *(_gb(plan.peak) for plan in plans)
        yield row("torch reserved, peak", lambda one: _gb(one.reserved))
        yield row("process (NVML), peak", lambda one: _gb(one.process))
        yield "weights that stream", *(_gb(plan.hosted) for plan in plans)
        yield row("clocks, hottest, held down by", _state)
        yield row("PREDICTED by a roofline", _prediction)


def _percentile(found: Percentile) -> str:
    few = "" if found.supported else ", too few to tell"
    return f"{_seconds(found.seconds)} ({found.support} at or above{few})"


def _state(one: Drawn) -> str:
    low, high = one.state["clocks"]
    heat, reasons = one.state["temperature"], one.state["throttled"]
    if low is None or heat is None:
        return "unknown"
    return f"{low} to {high} MHz, {heat} °C, {', '.join(reasons) or 'nothing'}"


def _prediction(one: Drawn) -> str:
    if one.predicted is None:
        return "unknown for this card or model"
    seconds, floor = one.predicted.picture
    return f"{_seconds(seconds)}, at least {_seconds(floor)}; measured {one.median / seconds:.2f} of it"


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _gb(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / GB:.2f} GB"
