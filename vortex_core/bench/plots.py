"""The plots of each report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import GB
from ..utils.timing import Latency, percentile
from .baseline import Run
from .latency_report import LatencyReport
from .leak import MB, LeakReport
from .plot_style import STOP, WARN, Median, histogram, scatter, stacks, timeline, trend
from .readings import RESERVED
from .verdict import milliseconds
from .vram_report import MODEL, PEAK, TOTAL, VramReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .contest import Result

MS = "milliseconds"


def latency_plots(report: LatencyReport) -> dict[str, Figure]:
    """How the pictures' times are spread, what the phases take, and the times in order."""
    cached = [sample.seconds for sample in report.samples if not sample.cold]
    phases = {
        kind: {name: phase.percentile(50).seconds * 1e3 for name, phase in series.phases.items()}
        for kind, series in report.series.items()
    }
    run = {
        kind: [(s.started, s.seconds * 1e3) for s in report.samples if s.cold is cold]
        for kind, cold in (("cached prompt", False), ("new prompt", True))
    }
    return {
        "latency": spread(report.title, cached, report.series["cached"].whole),
        "phases": stacks(report.title, phases, f"{MS}, medians"),
        "run": timeline(report.title, run, labels=("seconds since the start", MS)),
    }


def spread(title: str, seconds: Sequence[float], latency: Latency) -> Figure:
    """The histogram of pictures' times, with P50, P95 and P99."""
    chosen = [latency.percentile(q) for q in (50, 95, 99)]
    marks = [(p.seconds * 1e3, f"P{p.q:g} {milliseconds(p.seconds)}") for p in chosen]
    return histogram(title, [value * 1e3 for value in seconds], marks, MS)


def vram_plot(report: VramReport) -> Figure:
    """Every counter over an engine's life, its stages and the limits of the budget."""
    names = report.timeline[0].reading
    start = report.timeline[0].seconds
    series = {
        name: [(m.seconds - start, value / GB) for m in report.timeline if (value := m.reading[name]) is not None]
        for name in names
    }
    levels = [(MODEL / GB, "model, at most", WARN), (TOTAL / GB, "in all, at most", STOP)]
    moments = [(stage.began - start, stage.name) for stage in report.stages if stage.name != PEAK]
    moments.append((report.peak_at - start, PEAK))
    return timeline(report.title, series, levels if RESERVED in names else (), moments=moments)


def leak_plot(report: LeakReport) -> Figure:
    """Each counter's readings against its first one, by picture."""
    series = {
        f"{t.counter}: {t.slope / MB:+.3f} MB a picture": [
            (i + 1.0, (reading - t.readings[0]) / MB) for i, reading in enumerate(t.readings)
        ]
        for t in report.trends
    }
    return timeline(report.title, series, labels=("pictures", "MB since the first"), from_zero=False)


def trend_plot(title: str, runs: Sequence[Run]) -> Figure:
    """The median of every run that was kept."""
    medians = []
    for run in runs:
        p = percentile(run.seconds, 50)
        name = f"{run.when[:16].replace('T', ' ')}\n{run.vortex}"
        medians.append(Median(name, p.seconds * 1e3, p.low * 1e3, p.high * 1e3, run.baseline))
    return trend(title, medians, f"{MS}, medians", "baseline")


def pairs_plot(title: str, revision: str, before: Sequence[float], after: Sequence[float]) -> Figure:
    """The times of two revisions that took turns."""
    sides = ((revision, before), ("now", after))
    series = {name: [(float(i), s * 1e3) for i, s in enumerate(side)] for name, side in sides}
    return timeline(title, series, labels=("pair", MS))


def compare_plot(result: Result) -> Figure:
    """Every contender at every size: a picture's time against the most that torch reserved."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for row in result.rows:
        at = (row.peak / GB, row.picture.percentile(50).seconds * 1e3)
        points.setdefault(f"{row.width} x {row.height}", {})[row.contender] = at
    title = f"a picture of 4 steps, prompt cached; {result.machine['device']}"
    return scatter(title, points, ("GB that torch reserved at the peak", f"{MS}, median"))
