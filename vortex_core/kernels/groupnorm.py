"""Group norm and SiLU of a channels-last picture: one pass for the statistics, one to apply them.

The library's norm reads a channels-last picture badly, and a separate SiLU is one more pass over maps of up to 500 MB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import EPSILON

_EPSILON = tl.constexpr(EPSILON)
TILE = 8192  # values that a program reads at a time
ROUNDS = 8  # tiles that a program sums; partial sums are added up in one order, so that results repeat bit for bit


@triton.jit
def _partial(x, parts, pixels, C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr, ROUNDS: tl.constexpr):
    column = tl.arange(0, C)
    total, square = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for i in range(ROUNDS):
        pixel = (tl.program_id(0) * ROUNDS + i) * PIXELS + tl.arange(0, PIXELS)
        place = pixel.to(tl.int64)[:, None] * C + column[None, :]
        value = tl.load(x + place, mask=(pixel < pixels)[:, None], other=0.0).to(tl.float32)
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
    place = parts + (tl.program_id(0) * G + tl.arange(0, G)) * 2
    tl.store(place, tl.sum(tl.reshape(total, [G, C // G]), 1))
    tl.store(place + 1, tl.sum(tl.reshape(square, [G, C // G]), 1))


@triton.jit
def _apply(
    x, statistics, weight, bias, out, pixels, count, C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, C)
    place = statistics + column // (C // G) * 2
    mean = tl.load(place) / count
    scale = tl.rsqrt(tl.load(place + 1) / count - mean * mean + _EPSILON) * tl.load(weight + column).to(tl.float32)
    shift = tl.load(bias + column).to(tl.float32) - mean * scale
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    place = pixel.to(tl.int64)[:, None] * C + column[None, :]
    mask = (pixel < pixels)[:, None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    tl.store(out + place, (value / (1 + tl.exp2(-1.4426950408889634 * value))).to(out.dtype.element_ty), mask=mask)


def group_sums(x: Tensor, groups: int) -> Tensor:
    """See `reference.group_sums`. `x` is channels-last; C and `groups` are powers of two."""
    _, channels, height, width = x.shape
    tile = TILE // channels
    parts = x.new_empty(triton.cdiv(height * width, tile * ROUNDS), groups, 2, dtype=torch.float32)
    _partial[(parts.shape[0],)](
        x, parts, height * width, C=channels, G=groups, PIXELS=tile, ROUNDS=ROUNDS, num_warps=8
    )  # fmt: skip
    return parts.sum(0)


def norm_silu(x: Tensor, sums: Tensor, pixels: int, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """See `reference.norm_silu`. `x` and `out` are channels-last."""
    _, channels, height, width = x.shape
    groups, tile = sums.shape[0], TILE // channels
    _apply[(triton.cdiv(height * width, tile),)](
        x, sums, weight, bias, out, height * width, float(pixels * (channels // groups)),
        C=channels, G=groups, PIXELS=tile, num_warps=8,
    )  # fmt: skip
    return out
