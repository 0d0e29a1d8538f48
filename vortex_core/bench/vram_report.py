"""VRAM over an engine's life: before it, loaded, at the peak of drawing, after it. Each stage has a limit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..device.vram import peak as peak_of
from ..errors import GB
from ..utils.timeline import Moment, Timeline
from .machine import machine, now
from .readings import ALLOCATED, RESERVED, Counters, at_rest, counters
from .report import Report
from .samples import describe, draw
from .verdict import FAIL, PASS, UNDECIDED, Verdict
from .workload import PROMPTS

if TYPE_CHECKING:
    from ..runtime.engine import Engine

MODEL, GENERATION, TOTAL = 6.5 * GB, 0.5 * GB, 7.0 * GB  # bytes of torch reserved, at most
SMALL = 512 * 512  # pixels; what generation adds is judged up to here, since larger pictures take more by design
REMAINS = 0.11 * GB  # cuBLAS keeps 34 MB for each of up to three streams that ever multiplied
PICTURES = 4
BASELINE, LOADED, PEAK, AFTER = "baseline", "loaded", "peak", "after clean-up"


@dataclass(frozen=True, slots=True)
class Stage:
    """One of baseline, loaded, peak and after clean-up. `counters` in bytes; `began` is a time of `perf_counter`."""

    name: str
    began: float
    counters: Counters


@dataclass(frozen=True, slots=True)
class VramReport(Report):
    """The stages of an engine's life. `ledger`: who holds what is reserved, when loaded."""

    schema: ClassVar[str] = "vortex.bench.vram/1"
    size: tuple[int, int]
    stages: tuple[Stage, ...]
    ledger: dict[str, int]
    timeline: tuple[Moment[Counters], ...]

    @property
    def words(self) -> str:
        """The size."""
        width, height = self.size
        return f"{width} x {height}"

    @property
    def peak_at(self) -> float:
        """When the first counter was highest while pictures were drawn, a time of `perf_counter`."""
        drawing, after = (stage.began for stage in self.stages[2:])
        moments = [moment for moment in self.timeline if drawing <= moment.seconds < after] or self.timeline[-1:]
        return max(moments, key=lambda moment: next(iter(moment.reading.values())) or 0).seconds

    @property
    def verdicts(self) -> list[Verdict]:
        """One a stage, on torch reserved, which is what a budget bounds. Undecided without a GPU."""
        reserved = [stage.counters.get(RESERVED) for stage in self.stages]
        baseline, loaded, peak, after = (value or 0 for value in reserved)
        generation = (("generation adds", peak - loaded, GENERATION),) if prod(self.size) <= SMALL else ()
        judged = (
            ("model", loaded - baseline, MODEL),
            *generation,
            ("peak in all", peak, TOTAL),
            ("after clean-up, over the baseline", after - baseline, REMAINS),
        )
        return [_judge(what, taken, limit, measured=None not in reserved) for what, taken, limit in judged]

    def measured(self) -> dict[str, Any]:
        """Everything but the timeline."""
        return {"size": self.size, "stages": [asdict(stage) for stage in self.stages], "ledger": self.ledger}


def run(
    load: Callable[[], Engine],
    device: torch.device,
    *,
    size: tuple[int, int] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    **options: Any,
) -> VramReport:
    """Load an engine on `device`, draw a few pictures of new prompts, unload it. `options` go to `Engine.generate`.

    `size`: width and height, by default the model's native size.
    """
    when = now()
    cuda = device.type == "cuda"
    if cuda:
        torch.zeros(1, device=device)  # the CUDA context belongs to the baseline
        torch.cuda.empty_cache()

    def stage(name: str) -> Stage:
        return Stage(name, time.perf_counter(), at_rest(device))

    with Timeline(partial(counters, device)) as timeline:
        baseline = stage(BASELINE)
        engine = load()
        loaded = stage(LOADED)
        ledger, model = engine.ledger.rows, describe(engine)
        width, height = size or (engine.native_size, engine.native_size)
        began = time.perf_counter()
        with peak_of(device) as most:
            for i, prompt in enumerate(PROMPTS[:PICTURES]):
                draw(engine, prompt, i, width=width, height=height, **options)
                if on_picture is not None:
                    on_picture(i + 1, PICTURES)
        peak = Stage(PEAK, began, at_rest(device))
        if cuda:
            # torch's own peaks; samples at intervals can miss one
            peak.counters.update({ALLOCATED: most.allocated, RESERVED: most.reserved})
        engine.unload()
        del engine
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        after = stage(AFTER)
    for moment in timeline.moments:
        if began <= moment.seconds < after.began:
            for name, value in moment.reading.items():
                peak.counters[name] = max(peak.counters.get(name) or 0, value or 0) or None
    stages = (baseline, loaded, peak, after)
    return VramReport(model, machine(device), when, (width, height), stages, ledger, tuple(timeline.moments))


def _judge(what: str, taken: int, limit: float, *, measured: bool) -> Verdict:
    what = f"{what} at most {limit / GB:g} GB"
    if not measured:
        return Verdict(what, UNDECIDED, "there is no GPU here, so there is no VRAM to measure")
    return Verdict(what, PASS if taken <= limit else FAIL, f"{taken / GB:.2f} GB of torch reserved")
