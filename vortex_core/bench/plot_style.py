"""The kinds of plots: a histogram, lines over time, stacked bars, a trend of medians, named points.

They are made without pyplot: it keeps global state and wants the main thread, and ComfyUI's nodes run in another.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.printable import printable
from ..utils.whole_files import write

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


@dataclass(frozen=True, slots=True)
class Median:
    """One point of a trend, with its interval. `special` points have another colour."""

    name: str
    value: float
    low: float
    high: float
    special: bool


def histogram(title: str, samples: Sequence[float], marks: Sequence[tuple[float, str]], label: str) -> Figure:
    """Counts of samples in equal bins, with `(value, name)` marks."""
    figure, axes = _sheet(title, label, "pictures")
    bins = min(30, max(5, math.ceil(2 * math.sqrt(len(samples)))))
    axes.hist(samples, bins=bins, color=COLOURS[0], edgecolor="white")
    for (value, name), colour in zip(marks, (*COLOURS[1:], STOP), strict=False):
        axes.axvline(value, color=colour, linewidth=2, label=printable(name))
    _legend(axes)
    return figure


def timeline(
    title: str,
    series: Mapping[str, Sequence[Point]],
    levels: Sequence[Level] = (),
    labels: tuple[str, str] = ("seconds", "GB"),
    moments: Sequence[tuple[float, str]] = (),
    from_zero: bool = True,
) -> Figure:
    """Lines of `(x, y)`, dashed levels, named moments. Without any points the figure says so."""
    figure, axes = _sheet(title, *labels)
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        if line:
            marker = "o" if len(line) == 1 else None
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=2, marker=marker, label=printable(name))
    for value, name, colour in levels:
        axes.axhline(value, color=colour, linewidth=1.5, linestyle="--", label=name)
    for x, name in moments:
        axes.axvline(x, color=SOFT, linewidth=1, linestyle=":")
        axes.text(x, 0.02, name, transform=axes.get_xaxis_transform(), ha="left", color=SOFT, size=9, rotation=90)
    if not any(series.values()):
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=SOFT, size=14)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    _legend(axes)
    return figure


def stacks(title: str, bars: Mapping[str, Mapping[str, float]], label: str) -> Figure:
    """A horizontal bar for each entry of `bars`, cut into its named parts."""
    figure, axes = _sheet(title, label, "")
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    ends = dict.fromkeys(bars, 0.0)
    for i, name in enumerate(names):
        widths = {bar: parts.get(name, 0.0) for bar, parts in bars.items()}
        axes.barh(
            list(bars), list(widths.values()), left=list(ends.values()), color=COLOURS[i % len(COLOURS)],
            edgecolor="white", height=0.5, label=name,
        )  # fmt: skip
        ends = {bar: ends[bar] + widths[bar] for bar in bars}
    axes.invert_yaxis()
    _legend(axes)
    return figure


def trend(title: str, medians: Sequence[Median], label: str, special: str) -> Figure:
    """Medians in order with their intervals. `special` is the legend's name for special points."""
    figure, axes = _sheet(title, "", label)
    axes.plot([m.value for m in medians], color=SOFT, linewidth=1)
    for kind, colour, name in ((False, COLOURS[0], "run"), (True, WARN, special)):
        chosen = [(i, m) for i, m in enumerate(medians) if m.special is kind]
        if chosen:
            spread = [[m.value - m.low for _, m in chosen], [m.high - m.value for _, m in chosen]]
            axes.errorbar(
                [i for i, _ in chosen], [m.value for _, m in chosen], yerr=spread, fmt="o", color=colour, capsize=4,
                label=name,
            )  # fmt: skip
    axes.set_xticks(range(len(medians)), [m.name for m in medians], rotation=30, ha="right")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def scatter(title: str, groups: Mapping[str, Mapping[str, Point]], labels: tuple[str, str]) -> Figure:
    """Named points `(x, y)`. A name has the same colour in every group; each group has its own marker."""
    figure, axes = _sheet(title, *labels)
    names = list(dict.fromkeys(name for points in groups.values() for name in points))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for (group, points), mark in zip(groups.items(), ("o", "s", "^", "D"), strict=False):
        for name, (x, y) in points.items():
            axes.plot(x, y, mark, color=colours[name], markersize=8, label=f"{name}, {group}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    handles, written = axes.get_legend_handles_labels()
    axes.legend(
        handles, written, frameon=False, labelcolor=SOFT, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """RGB, `[H, W, 3]`."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _literal(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, stem: Path) -> None:
    """Write `stem.png` and `stem.svg`."""
    import matplotlib

    _literal(figure)
    # text stays text, and equal figures make equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vortex"}):
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, metadata=metadata)
            write(stem.with_name(f"{stem.name}.{kind}"), drawn.getvalue(), replace=True)


def _literal(figure: Figure) -> None:
    """Make dollar signs in names and prompts plain text: they start no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _sheet(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(printable(title), loc="left", color=INK, size=13)
    axes.set_xlabel(x, color=SOFT)
    axes.set_ylabel(y, color=SOFT)
    axes.tick_params(colors=SOFT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:
        axes.figure.legend(handles, names, frameon=False, labelcolor=SOFT, ncols=5, loc="outside lower left")
