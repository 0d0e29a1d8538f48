"""Group norm and SiLU of a channels-last picture: one pass for the statistics, one to apply them.

The library's norm reads a channels-last picture badly, and a separate SiLU is one more pass over maps of up to 500 MB.
A program finds the moments of one tile, about the tile's own mean; `reference.join_moments` joins them in a fixed
order. So nothing is a difference of large sums, strips and whole pictures agree, and results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16384  # values that a program takes
WARPS = 8


@triton.jit
def _moments(x, parts, pixels, C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    mask = (pixel < pixels)[:, None]
    place = pixel.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS).to(tl.float32)
    # a channel's moments first: its values lie in few threads, and a group's are joined from them
    mean = tl.sum(value, 0) / count
    value = tl.where(mask, value - mean[None, :], 0.0)
    mean = tl.reshape(mean, [G, C // G])
    square = tl.sum(tl.reshape(tl.sum(value * value, 0), [G, C // G]), 1)
    middle = tl.sum(mean, 1) / (C // G)
    square += count * tl.sum((mean - middle[:, None]) * (mean - middle[:, None]), 1)
    place = parts + (tl.program_id(0) * G + tl.arange(0, G)) * 3
    tl.store(place, count * (C // G) + tl.zeros([G], tl.float32))
    tl.store(place + 1, middle)
    tl.store(place + 2, square)


@triton.jit
def _apply(x, scale, shift, out, pixels, C: tl.constexpr, PIXELS: tl.constexpr):
    column = tl.arange(0, C)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    place = pixel.to(tl.int64)[:, None] * C + column[None, :]
    mask = (pixel < pixels)[:, None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(scale + column)[None, :] + tl.load(shift + column)[None, :]
    value = value / (1 + tl.exp2(-1.4426950408889634 * value))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def group_moments(x: Tensor, groups: int) -> Tensor:
    """See `reference.group_moments`. `x` is channels-last; C and `groups` are powers of two."""
    _, channels, height, width = x.shape
    tile = TILE // channels
    parts = x.new_empty(triton.cdiv(height * width, tile), groups, 3, dtype=torch.float32)
    _moments[(parts.shape[0],)](x, parts, height * width, C=channels, G=groups, PIXELS=tile, num_warps=WARPS)
    return parts


def norm_silu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """See `reference.norm_silu`. `x` and `out` are channels-last."""
    _, channels, height, width = x.shape
    tile = TILE // channels
    grid = (triton.cdiv(height * width, tile),)
    _apply[grid](x, scale, shift, out, height * width, C=channels, PIXELS=tile, num_warps=WARPS)
    return out
