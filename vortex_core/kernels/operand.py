"""What products and attention take: values, and in 8 bits their scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # a row of zeros is scaled by this instead of by zero


class Operand(NamedTuple):
    """`values` `[B, T, K]`, last dimension contiguous. In fp8, value times `scale` (fp32 `[B, T]`) is meant."""

    values: Tensor
    scale: Tensor | None = None

    def tokens(self, start: int, stop: int) -> Operand:
        """The part for tokens `start` to `stop`, as views."""
        return Operand(self.values[:, start:stop], None if self.scale is None else self.scale[:, start:stop])


TILE = 128  # tokens that share a scale of keys, and one of values


class Heads(NamedTuple):
    """q, k and v in fp8, tokens padded with zeros to whole tiles.

    `q`, `k` `[B, H, L, C]`; `v` `[B, H, C, L]`, as the tensor cores want it. Scales are fp32: `q_scale` `[B, H, L]`,
    `k_scale` and `v_scale` `[B, H, L / TILE]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


def head_shapes(batch: int, heads: int, tokens: int, channels: int) -> list[tuple[int, ...]]:
    """The shapes of the tensors of `Heads`, in order, for `tokens`."""
    tiles = -(-tokens // TILE)
    planes, padded = (batch, heads), tiles * TILE
    rows = (*planes, padded, channels)
    return [rows, rows, (*planes, channels, padded), (*planes, padded), (*planes, tiles), (*planes, tiles)]
