"""The decoder's 3 x 3 convolutions of channels-last pictures, and those of pictures doubled by repeating pixels.

A convolution is nine products, each of the picture moved by one of nine offsets and that tap's weights. With a border
of one pixel around the picture, a move is an offset in memory: a tile is a run of pixels with their border, which the
bulk copy engine fetches (2 of W + 2 results are unused). The moments for the next norm are computed while a tile is in
registers. A doubled picture is never made: a pixel becomes four, and each of them sees two by two pixels of the small
picture. So four products of summed taps replace nine for each pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .card import card
from .groupnorm import write_moments
from .scaled_tensor import PIXELS, Moments

ROW = 128  # bytes of a tile's row, the most that the copy engine takes at once
STAGES = 3  # tiles that are fetched ahead, at most


@triton.jit(do_not_specialize=["height", "width", "stride", "first_part"])
def _convolve(
    x, weight, bias, out, moments, height, width, stride, first_part, COPIES: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr, ADD: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    UP: tl.constexpr = 4 - TAPS  # 2 for a doubled picture, which has two by two taps
    channel = tl.program_id(0) % BLOCKS * BLOCK_N
    corner = tl.program_id(0) // BLOCKS
    down, right = corner // 2, corner % 2
    start = tl.program_id(1) * PIXELS
    summed = tl.zeros([PIXELS, BLOCK_N], tl.float32)
    STEPS: tl.constexpr = C // INNER
    for i in range(TAPS * TAPS * STEPS):
        tap, inner = i // STEPS, i % STEPS * INNER
        first = start + (tap // TAPS + down) * (width + 2) + tap % TAPS + right
        pixels = tiles.load(x, first, inner, (height + 2) * (width + 2), C, PIXELS, INNER, COPIES)
        row = corner * N + channel
        taps = tiles.load(weight, row, tap * C + inner, UP * UP * N, TAPS * TAPS * C, BLOCK_N, INNER, COPIES)
        summed = tl.dot(pixels, taps.T, summed, input_precision=PRECISION)
    column = channel + tl.arange(0, BLOCK_N)
    pixel = start + tl.arange(0, PIXELS)
    row, across = pixel // (width + 2), pixel % (width + 2)
    inside = (row < height) & (across < width)
    mask = inside[:, None] & (column < N)[None, :]
    place = ((row * UP + down).to(tl.int64) * (width * UP) + across * UP + right)[:, None] * N + column[None, :]
    summed += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        summed += tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    value = summed.to(out.dtype.element_ty)
    tl.store(out + place, value, mask=mask)
    if GROUPS > 0:
        WIDTH: tl.constexpr = N // GROUPS
        HERE: tl.constexpr = BLOCK_N // WIDTH
        value = tl.where(mask, value.to(tl.float32), 0.0)
        count = tl.sum(inside.to(tl.float32), 0)
        place = (channel // WIDTH + tl.arange(0, HERE)) * stride + first_part
        place += corner * tl.num_programs(1) + tl.program_id(1)
        write_moments(moments + place, GROUPS * stride, value, mask, count, HERE, WIDTH)


@triton.jit
def _sum_taps(weight, taps, C: tl.constexpr):
    channel = tl.arange(0, C)
    corner, tap = tl.arange(0, 16) // 4, tl.arange(0, 16) % 4
    summed = tl.zeros([16, C], tl.float32)
    for old in range(9):
        # the first row of a doubled pixel sees the pixel above by tap 0, and its own by taps 1 and 2; so do columns
        here = ((old // 3 > corner // 2) == (tap // 2 == 1)) & ((old % 3 > corner % 2) == (tap % 2 == 1))
        value = tl.load(weight + (tl.program_id(0) * 9 + old) * C + channel)
        summed += tl.where(here[:, None], value.to(tl.float32)[None, :], 0.0)
    row = corner * tl.num_programs(0) + tl.program_id(0)
    tl.store(taps + (row * 4 + tap)[:, None] * C + channel[None, :], summed.to(taps.dtype.element_ty))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None, *, add: bool = False
) -> None:
    """See `reference.convolve`. All channels-last; C is a power of two."""
    _launch(x, weight.permute(0, 2, 3, 1).flatten(1), bias, out, moments, add=add)


def corner_taps(weight: Tensor, out: Tensor) -> None:
    """`weight` `[N, C, 3, 3]` as `convolve_doubled` takes it: `[4 N, 4 C]`, the sums of taps that see one pixel."""
    wide, channels = weight.shape[:2]
    _sum_taps[(wide,)](weight, out, C=channels, num_warps=4)


def convolve_doubled(x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None) -> None:
    """See `reference.convolve_doubled`. All channels-last; C is a power of two."""
    _launch(x, taps, bias, out, moments, corners=4)


def _launch(
    x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, moments: Moments | None, *, corners: int = 1, add: bool = False
) -> None:
    _, channels, height, width = x.shape
    wide, itemsize = len(bias), x.element_size()
    inner = min(channels, ROW // itemsize)
    known = card(x.device)
    pixels, block = 128, min(256, max(16, triton.next_power_of_2(wide)))
    if itemsize == 4:  # computed from registers, without the matrix units
        pixels, block = PIXELS, min(block, 64)
    columns = triton.cdiv(wide, block) * corners
    run = (height - 2) * width  # pixels with a border to their right
    if columns * triton.cdiv(run, pixels) < known.processors:
        pixels = PIXELS
    if (pixels + block) * inner * itemsize * STAGES > known.shared:
        block = min(block, 128)
        columns = triton.cdiv(wide, block) * corners
    across = triton.cdiv(run, pixels)
    values, groups, stride, first = None, 0, 0, 0
    if moments is not None:
        values, first = moments.values, moments.take(across * corners)
        _, groups, stride = values.shape
    rows = x[0].permute(1, 2, 0).flatten(0, 1)
    _convolve[(columns, across)](
        tiles.source(rows, pixels, inner, copies=known.copies), tiles.source(taps, block, inner, copies=known.copies),
        bias, out, values, height - 2, width - 2, stride, first, COPIES=known.copies,
        C=channels, N=wide, GROUPS=groups, TAPS=3 if corners == 1 else 2, ADD=add,
        PIXELS=pixels, BLOCK_N=block, INNER=inner, PRECISION="ieee" if itemsize == 4 else "tf32",
        num_warps=8 if pixels == 128 and block >= 128 else 4,
        num_stages=max(1, min(STAGES, known.shared // ((pixels + block) * inner * itemsize))),
    )  # fmt: skip
