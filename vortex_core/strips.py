"""Feature maps as strips of rows, so that a picture is decoded in a quarter of the memory and stays the same.

Independent tiles change the statistics of every GroupNorm and cut the attention of the mid block, and show. Here a
norm takes its statistics over the whole map before it is applied, and a convolution sees the rows above and below its
strip: strips of any height, and the whole map as one, compute the same but for the order of sums.

A map is a list of strips, top to bottom, each `[1, C, rows, W]`. A strip is dropped as soon as the next map has it, so
that about one map is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Kernels, reference

Map = list[Tensor]


class Window:
    """Strip `i` of a map, and `x`, the same with its neighbours' nearest rows where it has any `above` and `below`."""

    __slots__ = ("above", "below", "strip", "x")

    def __init__(self, strips: Map, i: int) -> None:
        self.above, self.below = i > 0, i + 1 < len(strips)
        self.strip = strips[i]
        parts = [strips[i - 1][:, :, -1:]] if self.above else []
        parts.append(self.strip)
        parts += [strips[i + 1][:, :, :1]] if self.below else []
        self.x = torch.cat(parts, dim=2) if len(parts) > 1 else self.strip


def windows(strips: Map, *, keep: bool = False) -> Iterator[Window]:
    """The map's windows, top to bottom. Unless it is to be kept, the map is emptied on the way."""
    gone = torch.empty(0)
    for i in range(len(strips)):
        window = Window(strips, i)
        if not keep:
            if window.above:
                strips[i - 1] = gone
            if not window.below:
                strips[i] = gone
        yield window


class SiluGroupNorm(nn.GroupNorm):
    """A GroupNorm that SiLU follows, computed with `kernels`; see `Norm`."""

    kernels: Kernels = reference


class Norm:
    """A GroupNorm and SiLU, with statistics of a whole map, to be applied to any of its rows."""

    def __init__(self, norm: SiluGroupNorm, strips: Map) -> None:
        self._kernels = norm.kernels
        parts = torch.cat([self._kernels.group_moments(strip, norm.num_groups) for strip in strips])
        mean, variance = reference.join_moments(parts)
        channels = norm.num_channels // norm.num_groups
        self._scale = norm.weight.float() * (variance + norm.eps).rsqrt().repeat_interleave(channels)
        self._shift = norm.bias.float() - mean.repeat_interleave(channels) * self._scale

    def __call__(self, x: Tensor) -> Tensor:
        """`[1, C, rows, W]`, same out."""
        return self._kernels.norm_silu(x, self._scale, self._shift, torch.empty_like(x))


def convolve(conv: nn.Conv2d, x: Tensor, *, above: bool, below: bool) -> Tensor:
    """The 3 x 3 convolution of rows that bring the row `above` and `below` along, and lose them here.

    Where they do not, there is the map's border, beyond which the convolution sees zeros.
    """
    if not (above and below):
        x = F.pad(x, (0, 0, int(not above), int(not below)))
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))
