"""Group norm and SiLU of a channels-last picture: its moments, each channel's terms from them, and a pass that applies.

The library's norm is slow on a channels-last picture, and a separate SiLU is one more pass over maps of up to 500 MB.
A program computes the moments of one tile, about the tile's own mean (convolutions compute most of them), and they are
joined in a fixed order. So no result is a difference of large sums, strips and whole pictures agree, and results repeat
bit for bit. The result has the border of zeros that the next convolution reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .scaled_tensor import VALUES, Moments, Window

WARPS = 8
PARTS = 1024  # moments that are joined at once


@triton.jit
def write_moments(place, plane, value, mask, count, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the moments of `count` pixels, for GROUPS groups of WIDTH channels: three planes, `plane` numbers apart."""
    # first a channel's moments, as its values lie in few threads; a group's are joined from them
    mean = tl.sum(value, 0) / tl.maximum(count, 1.0)
    value = tl.where(mask, value - mean[None, :], 0.0)
    mean = tl.reshape(mean, [GROUPS, WIDTH])
    square = tl.sum(tl.reshape(tl.sum(value * value, 0), [GROUPS, WIDTH]), 1)
    middle = tl.sum(mean, 1) / WIDTH
    square += count * tl.sum((mean - middle[:, None]) * (mean - middle[:, None]), 1)
    tl.store(place, count * WIDTH + tl.zeros([GROUPS], tl.float32))
    tl.store(place + plane, middle)
    tl.store(place + 2 * plane, square)


# `first` is a number, not part of the pointer: another alignment of a pointer compiles the kernel again.
@triton.jit(do_not_specialize=["pixels", "stride", "first"])
def _moments(x, moments, pixels, stride, first, C: tl.constexpr, G: tl.constexpr, PIXELS: tl.constexpr):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    mask = (pixel < pixels)[:, None]
    place = pixel.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS).to(tl.float32)
    place = moments + tl.arange(0, G) * stride + first + tl.program_id(0)
    write_moments(place, G * stride, value, mask, count, G, C // G)


@triton.jit(do_not_specialize=["parts", "stride"])
def _join(
    moments, weight, bias, out, parts, stride, epsilon, G: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    group = tl.program_id(0)
    part = tl.arange(0, PARTS)
    total, mean = tl.zeros([PARTS], tl.float32), tl.zeros([PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        mask = first + part < parts
        place = moments + group * stride + first + part
        count = tl.load(place, mask=mask, other=0.0)
        total += count
        mean += count * tl.load(place + G * stride, mask=mask, other=0.0)
    total = tl.sum(total, 0)
    mean = tl.sum(mean, 0) / total
    square = tl.zeros([PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        mask = first + part < parts
        place = moments + group * stride + first + part
        off = tl.load(place + G * stride, mask=mask, other=0.0) - mean
        square += tl.load(place + 2 * G * stride, mask=mask, other=0.0)
        square += tl.load(place, mask=mask, other=0.0) * off * off
    unit = tl.rsqrt(tl.sum(square, 0) / total + epsilon)
    channel = group * WIDTH + tl.arange(0, WIDTH)
    factor = tl.load(weight + channel).to(tl.float32) * unit
    tl.store(out + channel, factor)
    tl.store(out + G * WIDTH + channel, tl.load(bias + channel).to(tl.float32) - mean * factor)


@triton.jit(do_not_specialize=["height", "width"])
def _apply(
    above, strip, below, scale, shift, out, height, width,
    C: tl.constexpr, PIXELS: tl.constexpr, ABOVE: tl.constexpr, BELOW: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, C)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, across = pixel // (width + 2) - 1, pixel % (width + 2) - 1
    inside = (across >= 0) & (across < width)
    here = inside & (row >= 0) & (row < height)
    place = (row.to(tl.int64) * width + across)[:, None] * C + channel[None, :]
    value = tl.load(strip + place, mask=here[:, None], other=0.0)
    place = across[:, None] * C + channel[None, :]
    if ABOVE:
        there = inside & (row == -1)
        value = tl.where(there[:, None], tl.load(above + place, mask=there[:, None], other=0.0), value)
        here = here | there
    if BELOW:
        there = inside & (row == height)
        value = tl.where(there[:, None], tl.load(below + place, mask=there[:, None], other=0.0), value)
        here = here | there
    value = value.to(tl.float32)
    if NORM:
        value = value * tl.load(scale + channel)[None, :] + tl.load(shift + channel)[None, :]
        value = value / (1 + tl.exp2(-1.4426950408889634 * value))
    value = tl.where(here[:, None], value, 0.0)
    place = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=(row <= height)[:, None])


def group_moments(x: Tensor, moments: Moments) -> None:
    """See `reference.group_moments`. `x` is channels-last; C and the groups are powers of two."""
    _, channels, height, width = x.shape
    _, groups, capacity = moments.values.shape
    tile = VALUES // channels
    parts = triton.cdiv(height * width, tile)
    _moments[(parts,)](
        x, moments.values, height * width, capacity, moments.take(parts), C=channels, G=groups, PIXELS=tile,
        num_warps=WARPS,
    )  # fmt: skip


def norm_terms(moments: Moments, weight: Tensor, bias: Tensor, epsilon: float, out: Tensor) -> None:
    """See `reference.norm_terms`. A group's channels are a power of two."""
    _, groups, capacity = moments.values.shape
    _join[(groups,)](
        moments.values, weight, bias, out, moments.parts, capacity, epsilon,
        G=groups, WIDTH=len(weight) // groups, PARTS=PARTS, num_warps=4,
    )  # fmt: skip


def norm_silu(window: Window, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """See `reference.norm_silu`. All channels-last."""
    _bordered(window, scale, shift, out)


def bordered(window: Window, out: Tensor) -> None:
    """See `reference.bordered`. All channels-last."""
    _bordered(window, None, None, out)


def _bordered(window: Window, scale: Tensor | None, shift: Tensor | None, out: Tensor) -> None:
    above, strip, below = window
    _, channels, height, width = strip.shape
    tile = VALUES // channels
    _apply[(triton.cdiv((height + 2) * (width + 2), tile),)](
        above, strip, below, scale, shift, out, height, width,
        C=channels, PIXELS=tile, ABOVE=above is not None, BELOW=below is not None, NORM=scale is not None,
        num_warps=WARPS,
    )  # fmt: skip
