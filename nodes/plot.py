"""The benchmarks' figures as IMAGE tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..vortex_core.bench.plot_style import HEIGHT, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def image(figure: Figure) -> Tensor:
    """IMAGE, `[1, H, W, 3]` in 0..1."""
    import numpy as np
    import torch

    from ..vortex_core.bench.plot_style import pixels

    return torch.from_numpy(pixels(figure).astype(np.float32) / 255)[None]


def beside(report: str, draw: Callable[[], Figure]) -> tuple[str, Tensor]:
    """A node's report, and its figure as IMAGE. If it cannot be drawn, it is blank, and a line in the report says why.

    Nothing that was drawn or measured may be lost for a broken matplotlib.
    """
    import torch

    from ..vortex_core.utils.packages import first_line, missing, remedy

    why = missing("matplotlib.figure")
    if why is None:
        try:
            return report, image(draw())
        except Exception as error:
            why = f"does not draw ({first_line(error)})"
    return f"{report}\nNo plot: matplotlib {why}. Try `{remedy('matplotlib')}`.", torch.ones(1, HEIGHT, WIDTH, 3)
