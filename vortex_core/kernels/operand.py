"""What kernels take: values and in 8 bits their scales; heads; a strip of a picture and what lies beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..allocator import round_up

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-12  # a row of zeros is scaled by this instead of by zero
TILE = 128  # keys of a head whose values share a scale


class Operand(NamedTuple):
    """`values` `[B, T, K]`, last dimension contiguous. In fp8, value times `scale` (fp32 `[B, T]`) is meant."""

    values: Tensor
    scale: Tensor | None = None

    def tokens(self, start: int, stop: int) -> Operand:
        """The part for tokens `start` to `stop`, as views."""
        return Operand(self.values[:, start:stop], None if self.scale is None else self.scale[:, start:stop])


class Heads(NamedTuple):
    """Queries, keys and values of every head in fp8, as `attend_heads` takes them.

    `q`, `k` `[B, L, H, C]`, times `unit` `[2]`. `v` `[B, H, C, P]`, P = L rounded up to whole tiles, times `v_scale`
    `[B, H, P / TILE]`, with keys in another order: of each 16, key 8 i + 2 j + e (i, e < 2, j < 4) is at 4 j + 2 i + e.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    v_scale: Tensor
    unit: Tensor


class Window(NamedTuple):
    """A strip of a feature map, `[1, C, h, w]`, and the rows of its neighbours that touch it; None: there is none."""

    above: Tensor | None
    strip: Tensor
    below: Tensor | None

    def rows(self) -> Tensor:
        """All of it as one map."""
        parts = [part for part in self if part is not None]
        return torch.cat(parts, dim=2) if len(parts) > 1 else self.strip


def empty_heads(qkv: Tensor, dtype: torch.dtype = FP8) -> Heads:
    """For `qkv` `[B, L, 3, H, C]`, uninitialized."""
    batch, tokens, _, count, channels = qkv.shape
    padded = round_up(tokens, TILE)
    q, k = (qkv.new_empty(batch, tokens, count, channels, dtype=dtype) for _ in range(2))
    v = qkv.new_empty(batch, count, channels, padded, dtype=dtype)
    v_scale, unit = (qkv.new_empty(shape, dtype=torch.float32) for shape in ((batch, count, padded // TILE), (2,)))
    return Heads(q, k, v, v_scale, unit)


def empty_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A feature map as the fused kernels make them: channels last, in the type and on the device of `like`."""
    shape = (1, channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
