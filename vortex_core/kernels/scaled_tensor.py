"""The arguments of kernels: values with their scales in fp8; attention heads; strips of a map, and their moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..memory.arena import round_up

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # a row of zeros is divided by this instead of zero
TILE = 128  # keys of a head whose values share a scale
CHUNK = 2**23  # values of a map that plain torch takes at once, so that its allocations have a bound
PIXELS = 64  # the fewest whose moments a fused convolution computes at once
VALUES = 16384  # of a program of the fused group norm


class ScaledTensor(NamedTuple):
    """`values` `[B, T, K]`, last dimension contiguous. In 8 bits they stand for value times `scale` (fp32 `[B, T]`).

    In int8 what they stand for is rotated (see `rotation`).
    """

    values: Tensor
    scale: Tensor | None = None

    def tokens(self, start: int, stop: int) -> ScaledTensor:
        """Views of tokens `start` to `stop`."""
        return ScaledTensor(self.values[:, start:stop], None if self.scale is None else self.scale[:, start:stop])


class Heads(NamedTuple):
    """Queries, keys and values of every head in fp8, as `attend_heads` takes them.

    `q`, `k` `[B, L, H, C]` stand for their values times `unit` `[2]`. `v` `[B, H, C, P]`, P = L rounded up to whole
    tiles, stands for values times `v_scale` `[B, H, P / TILE]`. Its keys are in another order: of each 16, key
    8 i + 2 j + e (i, e < 2, j < 4) is at 4 j + 2 i + e.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    v_scale: Tensor
    unit: Tensor


class Window(NamedTuple):
    """A strip of a feature map, `[1, C, h, w]`, and the row of each neighbour that touches it, or None."""

    above: Tensor | None
    strip: Tensor
    below: Tensor | None


class Moments:
    """The moments of a map for its group norm, in parts that are appended as its strips are written.

    `values` fp32 `[3, groups, capacity]`: count, mean and sum of squares about the mean, of each group and part. The
    first `parts` are filled, and `norm_terms` joins them. `most_parts` is the most that a strip takes.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.parts = values, 0

    def take(self, count: int) -> int:
        """Take `count` more parts, and return the index of the first. Raises `ValueError` where there is no room."""
        first, capacity = self.parts, self.values.shape[2]
        if first + count > capacity:
            raise ValueError(f"Moments of {first + count} parts do not fit into {capacity}.")
        self.parts = first + count
        return first


def most_parts(channels: int, height: int, width: int, *, doubled: bool = False) -> int:
    """Parts that the moments of a strip `[1, C, h, w]` take at most, with any kernels and on any card.

    `doubled`: `convolve_doubled` made the strip.
    """
    pixels, corners = (height // 2 * (width // 2 + 2), 4) if doubled else (height * (width + 2), 1)
    found = corners * -(-pixels // PIXELS)
    looked_for = -(-height * width // max(1, VALUES // channels))
    return max(found, looked_for, -(-height // chunk_rows(channels * width)))


def chunk_rows(values: int) -> int:
    """Rows of `values` each that plain torch takes at once."""
    return max(1, CHUNK // values)


def empty_heads(qkv: Tensor, dtype: torch.dtype = FP8) -> Heads:
    """Uninitialized `Heads` for `qkv` `[B, L, 3, H, C]`."""
    batch, tokens, _, count, channels = qkv.shape
    padded = round_up(tokens, TILE)
    q, k = (qkv.new_empty(batch, tokens, count, channels, dtype=dtype) for _ in range(2))
    v = qkv.new_empty(batch, count, channels, padded, dtype=dtype)
    v_scale, unit = (qkv.new_empty(shape, dtype=torch.float32) for shape in ((batch, count, padded // TILE), (2,)))
    return Heads(q, k, v, v_scale, unit)
