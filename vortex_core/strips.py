"""Feature maps as strips of rows, so that a picture is decoded in a quarter of the memory and stays the same.

Independent tiles change the statistics of every GroupNorm and cut the attention of the mid block, and show. Here a
norm takes its statistics over the whole map before it is applied, and a convolution sees the rows above and below its
strip: strips of any height, and the whole map as one, compute the same but for the order of sums.

A map is a list of strips, top to bottom. A strip is dropped as soon as the next map has it, so that about one map is
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kernels import Kernels, Window, reference


@dataclass(slots=True)
class Strip:
    """Rows of a map, `[1, C, rows, W]`, and their `group_moments`, where a convolution found them on the way."""

    x: Tensor
    moments: Tensor | None = None


Map = list[Strip]
_GONE = Strip(torch.empty(0))


def windows(strips: Map, *, keep: bool = False) -> Iterator[Window]:
    """The map's strips with their neighbours' rows, top to bottom. Unless it is to be kept, the map is emptied."""
    for i, strip in enumerate(strips):
        # a copy of the row above, which as a view would keep all of its strip
        above = strips[i - 1].x[:, :, -1:].clone() if i else None
        below = strips[i + 1].x[:, :, :1] if i + 1 < len(strips) else None
        if not keep and i:
            strips[i - 1] = _GONE
        window = Window(above, strip.x, below)
        del above, below
        if not keep and i + 1 == len(strips):
            strips[i] = _GONE
        del strip
        yield window
        del window


def halves(window: Window) -> tuple[Window, Window]:
    """A window of two rows or more, cut in the middle."""
    x = window.strip
    middle = (x.shape[2] + 1) // 2
    upper = Window(window.above, x[:, :, :middle], x[:, :, middle : middle + 1])
    return upper, Window(x[:, :, middle - 1 : middle], x[:, :, middle:], window.below)


class SiluGroupNorm(nn.GroupNorm):
    """A GroupNorm that SiLU follows, computed with `kernels`; see `Norm`."""

    kernels: Kernels = reference


class Norm:
    """A GroupNorm and SiLU, with statistics of a whole map, to be applied to any of its windows."""

    def __init__(self, norm: SiluGroupNorm, strips: Map) -> None:
        kernels = self._kernels = norm.kernels
        found = [s.moments if s.moments is not None else kernels.group_moments(s.x, norm.num_groups) for s in strips]
        moments = torch.cat(found, dim=2) if len(found) > 1 else found[0]
        self._terms = kernels.norm_terms(moments, norm.weight, norm.bias, norm.eps)

    def __call__(self, window: Window) -> Tensor:
        """Bordered for the next convolution: `[1, C, rows + 2, W + 2]`."""
        return self._kernels.norm_silu(window, *self._terms)


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution of what is bordered, computed with `kernels`. `groups_after`: those of the norm after it."""

    kernels: Kernels = reference

    def __init__(self, inside: int, outside: int, groups_after: int = 0) -> None:
        super().__init__(inside, outside, 3, padding=1)
        self.groups_after = groups_after

    def strip(self, x: Tensor, onto: Strip | None = None) -> Strip:
        """Of `x`, bordered; added to `onto`, in place, if that is given."""
        assert self.bias is not None
        out = None if onto is None else onto.x
        return Strip(*self.kernels.convolve(x, self.weight, self.bias, out, self.groups_after))

    def doubled(self, taps: Tensor, x: Tensor) -> Strip:
        """Of `x`, bordered, with every pixel doubled in both directions; `taps` from `kernels.corner_taps`."""
        assert self.bias is not None
        return Strip(*self.kernels.convolve_doubled(x, taps, self.bias, self.groups_after))
