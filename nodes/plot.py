"""The benchmarks' figures as IMAGE tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..vortex_core.bench import plot_style
from ..vortex_core.bench.plot_style import HEIGHT as HEIGHT
from ..vortex_core.bench.plot_style import STOP as STOP
from ..vortex_core.bench.plot_style import WARN as WARN
from ..vortex_core.bench.plot_style import WIDTH as WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def timeline(
    title: str, series: Mapping[str, Sequence[plot_style.Point]], levels: Sequence[plot_style.Level] = ()
) -> Tensor:
    """Lines of `(seconds, GB)`; `levels` are `(GB, name, colour)`."""
    return image(plot_style.timeline(title, series, levels))


def histogram(title: str, samples: Sequence[float], marks: Sequence[tuple[float, str]], label: str) -> Tensor:
    """Counts of samples in equal bins, with `(value, name)` marks."""
    return image(plot_style.histogram(title, samples, marks, label))


def image(figure: Figure) -> Tensor:
    """IMAGE, `[1, H, W, 3]` in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(plot_style.pixels(figure).astype(np.float32) / 255)[None]


def beside(report: str, draw: Callable[[], Tensor]) -> tuple[str, Tensor]:
    """The report of a node, and its plot; where that cannot be made, a blank one and a line in the report.

    What was drawn and measured must not be lost for it, whatever is wrong with the library that plots.
    """
    import torch

    from ..vortex_core.utils.packages import first_line, missing, remedy

    why = missing("matplotlib.figure")
    if why is None:
        try:
            return report, draw()
        except Exception as error:
            why = f"does not draw ({first_line(error)})"
    blank = torch.ones(1, HEIGHT, WIDTH, 3)
    return f"{report}\nNo plot: matplotlib {why}. Try `{remedy('matplotlib')}`.", blank
