"""Statistics of timed pictures: percentiles of the whole and of each phase, outliers and their cause, verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..utils.timing import Latency, samples_needed, summarize
from .machine import Reading, machine, now
from .report import Report
from .samples import Sample, describe, measure, overhead
from .verdict import FAIL, PASS, UNDECIDED, Verdict
from .workload import Workload

if TYPE_CHECKING:
    from ..runtime.engine import Engine

CLOCKS_AGREE = 0.01, 0.001  # share of a picture, and seconds, by which host and device clocks may differ


@dataclass(frozen=True, slots=True)
class Series:
    """Statistics of one kind of picture: of the whole, and of each phase by name."""

    whole: Latency
    phases: dict[str, Latency]


@dataclass(frozen=True, slots=True)
class Outlier:
    """A picture beyond 3 sigma. `phase` is the one that went furthest from its median, by `excess` seconds."""

    index: int
    cold: bool
    seconds: float
    phase: str
    excess: float
    reading: Reading


@dataclass(frozen=True, slots=True)
class LatencyReport(Report):
    """Timed pictures. `overhead` is in seconds a picture; `targets` are seconds by percentile."""

    schema: ClassVar[str] = "vortex.bench.latency/1"
    workload: Workload
    samples: tuple[Sample, ...]
    overhead: float
    targets: Mapping[float, float]
    interrupted: bool = False

    @property
    def words(self) -> str:
        """Size and steps."""
        return self.workload.words

    @property
    def series(self) -> dict[str, Series]:
        """Statistics by kind, `cached` and `cold`. A kind without samples is left out."""
        kinds = {"cached": [s for s in self.samples if not s.cold], "cold": [s for s in self.samples if s.cold]}
        return {kind: summarize_series(samples) for kind, samples in kinds.items() if samples}

    @property
    def outliers(self) -> list[Outlier]:
        """Outliers of both kinds. Each picture is compared with its own kind."""
        return [found for cold in (False, True) for found in find_outliers([s for s in self.samples if s.cold is cold])]

    @property
    def disagreements(self) -> int:
        """Pictures for which the host's clock and the sum of the phases differ by more than 1 % and 1 ms."""
        share, seconds = CLOCKS_AGREE
        return sum(abs(s.unmarked) > max(share * s.seconds, seconds) for s in self.samples)

    @property
    def overhead_share(self) -> float:
        """What measuring adds, as a share of the median picture."""
        return self.overhead / statistics.median(sample.seconds for sample in self.samples)

    @property
    def verdicts(self) -> list[Verdict]:
        """One for each target, judged by the pictures with cached prompts."""
        series = self.series.get("cached")
        return [judge(series.whole, q, target) for q, target in self.targets.items()] if series else []

    def measured(self) -> dict[str, Any]:
        """Everything but the samples."""
        return {
            "workload": asdict(self.workload),
            "series": {kind: asdict(series) for kind, series in self.series.items()},
            "outliers": [asdict(outlier) for outlier in self.outliers],
            "clock_disagreements": self.disagreements,
            "overhead_seconds": self.overhead,
            "overhead_share": self.overhead_share,
            "interrupted": self.interrupted,
        }


def run(
    engine: Engine,
    workload: Workload,
    *,
    targets: Mapping[float, float] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    on_sample: Callable[[Sample], None] | None = None,
    patience: float = math.inf,
) -> LatencyReport:
    """Measure a workload; `patience` as in `measure`.

    After Ctrl-C the report has what was measured so far, and `interrupted` is True.
    """
    when = now()
    samples: list[Sample] = []
    interrupted = False
    try:
        for sample in measure(engine, workload, on_picture, patience=patience):
            samples.append(sample)
            if on_sample is not None:
                on_sample(sample)
    except KeyboardInterrupt:
        if not samples:
            raise
        interrupted = True
    return LatencyReport(
        model=describe(engine),
        machine=machine(engine.device),
        workload=workload,
        when=when,
        samples=tuple(samples),
        overhead=overhead(samples[0], engine.device),
        targets=targets or {},
        interrupted=interrupted,
    )


def summarize_series(samples: Sequence[Sample]) -> Series:
    """Statistics of at least one picture."""
    phases = {name: summarize([s.phases[name] for s in samples]) for name in samples[0].phases}
    return Series(summarize([s.seconds for s in samples]), phases)


def find_outliers(samples: Sequence[Sample]) -> list[Outlier]:
    """The pictures of one kind that lie beyond 3 sigma, and the phase to blame."""
    if not samples:
        return []
    medians = {name: statistics.median(s.phases[name] for s in samples) for name in samples[0].phases}
    medians["unmarked"] = statistics.median(s.unmarked for s in samples)
    found = []
    for i, seconds in summarize([s.seconds for s in samples]).outliers:
        sample = samples[i]
        parts = {**sample.phases, "unmarked": sample.unmarked}
        excess = {name: parts[name] - median for name, median in medians.items()}
        phase = max(excess, key=lambda name: abs(excess[name]))
        found.append(Outlier(sample.index, sample.cold, seconds, phase, excess[phase], sample.reading))
    return found


def judge(latency: Latency, q: float, target: float) -> Verdict:
    """Judge whether the percentile `q` is at most `target` seconds.

    Where the samples are too few for `q`, a lower percentile that they do support can still break the target.
    """
    what = f"P{q:g} within {target:g} s"
    for p in latency.percentiles:
        if p.q <= q and p.supported and p.seconds > target:
            return Verdict(what, FAIL, f"P{p.q:g} is {p.seconds:.4g} s")
    wanted = latency.percentile(q)
    if not wanted.supported:
        return Verdict(what, UNDECIDED, f"not enough samples: {latency.count}, P{q:g} needs {samples_needed(q)}")
    interval = f"95 % interval {wanted.low:.4g} to {wanted.high:.4g} s"
    return Verdict(what, PASS, f"P{q:g} is {wanted.seconds:.4g} s, {interval}")
