"""The plots: how runs are spread, what phases take, values over time, medians over a history.

Figures are made without pyplot, which keeps global state and wants one thread; ComfyUI's nodes draw in another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..latency import Latency, percentile
from .baseline import Run
from .latency_report import LatencyReport
from .leak import MB, Trend
from .memory import GB, RESERVED
from .vram_report import MODEL, TOTAL, VramReport

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

WIDTH, HEIGHT, DPI = 960, 480, 100  # pixels
INK, SOFT, GRID = "#1c2530", "#67727e", "#e6e9ed"
COLOURS = ("#2463eb", "#0d9488", "#d97706", "#9333ea", "#0891b2", "#be185d", "#65a30d", "#475569")
WARN, STOP = "#d97706", "#dc2626"
Point = tuple[float, float]
Level = tuple[float, str, str]  # value, name, colour


def histogram(title: str, samples: Sequence[float], marks: Sequence[tuple[float, str]], label: str) -> Figure:
    """Counts of samples in equal bins, with `(value, name)` marks."""
    figure, axes = _sheet(title, label, "pictures")
    bins = min(30, max(5, math.ceil(2 * math.sqrt(len(samples)))))
    axes.hist(samples, bins=bins, color=COLOURS[0], edgecolor="white")
    for (value, name), colour in zip(marks, (*COLOURS[1:], STOP), strict=False):
        axes.axvline(value, color=colour, linewidth=2, label=name)
    _legend(axes)
    return figure


def timeline(
    title: str,
    series: Mapping[str, Sequence[Point]],
    levels: Sequence[Level] = (),
    labels: tuple[str, str] = ("seconds", "GB"),
    moments: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Lines of `(x, y)` from zero up, dashed levels, named moments. Says so where there is nothing to draw."""
    figure, axes = _sheet(title, *labels)
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        if line:
            marker = "o" if len(line) == 1 else None
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=2, marker=marker, label=name)
    for value, name, colour in levels:
        axes.axhline(value, color=colour, linewidth=1.5, linestyle="--", label=name)
    if not any(series.values()):
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=SOFT, size=14)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    for x, name in moments:
        axes.axvline(x, color=SOFT, linewidth=1, linestyle=":")
        axes.text(x, 1, f" {name}", transform=axes.get_xaxis_transform(), va="top", color=SOFT, size=9, rotation=90)
    _legend(axes)
    return figure


def latency_plots(report: LatencyReport) -> dict[str, Figure]:
    """The plots of a latency report, by name."""
    cached = [sample.seconds * 1e3 for sample in report.samples if not sample.cold]
    latency = report.series["cached"].whole
    plots = {
        "latency": histogram(report.title, cached, percentile_marks(latency), "milliseconds"),
        "phases": phases(report.title, {kind: series.phases for kind, series in report.series.items()}),
    }
    series = {
        kind: [(s.started, s.seconds * 1e3) for s in report.samples if s.cold is cold]
        for kind, cold in (("cached prompt", False), ("new prompt", True))
    }
    plots["run"] = timeline(report.title, series, labels=("seconds since the start", "milliseconds"))
    return plots


def percentile_marks(latency: Latency) -> list[tuple[float, str]]:
    """P50, P95 and P99 in milliseconds, for a histogram."""
    chosen = [latency.percentile(q) for q in (50, 95, 99)]
    return [(p.seconds * 1e3, f"P{p.q:g} {p.seconds * 1e3:.1f} ms") for p in chosen]


def vram_timeline(report: VramReport) -> Figure:
    """Every counter over an engine's life, its stages and the limits of the budget."""
    names = report.timeline[0].counters
    series = {
        name: [(r.seconds, value / GB) for r in report.timeline if (value := r.counters[name]) is not None]
        for name in names
    }
    levels = []
    if RESERVED in names:
        levels = [(MODEL / GB, "model, at most", WARN), (TOTAL / GB, "in all, at most", STOP)]
    return timeline(report.title, series, levels, moments=[(stage.began, stage.name) for stage in report.stages])


def phases(title: str, kinds: Mapping[str, Mapping[str, Latency]]) -> Figure:
    """One bar a kind of picture, cut into the medians of its phases, in milliseconds."""
    figure, axes = _sheet(title, "milliseconds, medians", "")
    names = list(dict.fromkeys(name for parts in kinds.values() for name in parts))
    start = dict.fromkeys(kinds, 0.0)
    for i, name in enumerate(names):
        widths = {
            kind: parts[name].percentile(50).seconds * 1e3 if name in parts else 0 for kind, parts in kinds.items()
        }
        axes.barh(
            list(kinds), list(widths.values()), left=list(start.values()), color=COLOURS[i % len(COLOURS)],
            edgecolor="white", height=0.5, label=name,
        )  # fmt: skip
        start = {kind: start[kind] + widths[kind] for kind in kinds}
    axes.invert_yaxis()
    _legend(axes)
    return figure


def trend(title: str, history: Sequence[Run]) -> Figure:
    """Medians of all runs with their intervals, in order; baselines apart."""
    figure, axes = _sheet(title, "run", "median, milliseconds")
    medians = [percentile(run.seconds, 50) for run in history]
    axes.plot([p.seconds * 1e3 for p in medians], color=SOFT, linewidth=1)
    for baseline, colour, name in ((False, COLOURS[0], "run"), (True, WARN, "baseline")):
        chosen = [i for i, run in enumerate(history) if run.baseline is baseline]
        values = [medians[i].seconds * 1e3 for i in chosen]
        below = [(medians[i].seconds - medians[i].low) * 1e3 for i in chosen]
        above = [(medians[i].high - medians[i].seconds) * 1e3 for i in chosen]
        if chosen:
            axes.errorbar(chosen, values, yerr=(below, above), fmt="o", color=colour, capsize=4, label=name)
    axes.set_xticks(range(len(history)), [_run_name(run) for run in history], rotation=30, ha="right")
    _legend(axes)
    return figure


def growth(title: str, trends: Sequence[Trend]) -> Figure:
    """Each counter's readings against its first one, in MB, by picture."""
    figure, axes = _sheet(title, "pictures", "MB since the first")
    for found, colour in zip(trends, COLOURS, strict=False):
        values = [(reading - found.readings[0]) / MB for reading in found.readings]
        name = f"{found.counter}: {found.slope / MB:+.3f} MB a picture"
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=2, label=name)
    _legend(axes)
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """RGB, `[H, W, 3]`."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`; the paths."""
    import matplotlib

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    # text as text; a picture of the same figures is the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vortex"}):
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _sheet(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, size=13)
    axes.set_xlabel(x, color=SOFT)
    axes.set_ylabel(y, color=SOFT)
    axes.tick_params(colors=SOFT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, labelcolor=SOFT, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.14))


def _run_name(run: Run) -> str:
    return f"{run.when[:16].replace('T', ' ')}\n{run.vortex}"
