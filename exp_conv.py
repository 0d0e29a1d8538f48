"""The decoder's 3 x 3 convolutions on channels-last pictures, with the skip added on the way out.

A convolution is nine products: of the picture, moved by one of nine offsets, and the weights of that tap. The bulk
copy engine fetches the moved tiles, and puts zeros where a tile reaches beyond the border.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS = 2, 64  # of pixels, a tile
INNER = 64  # channels a tile
WARPS, STAGES = 8, 4


@triton.jit
def _convolve(
    x, weight, bias, skip, out, height, width, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, INNER: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_N
    left, top = tl.program_id(1) * COLUMNS, tl.program_id(2) * ROWS
    summed = tl.zeros([ROWS * COLUMNS, BLOCK_N], tl.float32)
    STEPS: tl.constexpr = C // INNER
    for i in range(9 * STEPS):
        tap, inner = i // STEPS, i % STEPS * INNER
        pixels = x.load([top + tap // 3 - 1, left + tap % 3 - 1, inner])
        taps = weight.load([channel, tap * C + inner])
        summed = tl.dot(tl.reshape(pixels, [ROWS * COLUMNS, INNER]), taps.T, summed)
    column = channel + tl.arange(0, BLOCK_N)
    pixel = tl.arange(0, ROWS * COLUMNS)
    row, across = top + pixel // COLUMNS, left + pixel % COLUMNS
    mask = ((row < height) & (across < width))[:, None] & (column < N)[None, :]
    place = (row * width + across).to(tl.int64)[:, None] * N + column[None, :]
    summed += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if SKIP:
        summed += tl.load(skip + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, summed.to(out.dtype.element_ty), mask=mask)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, skip: Tensor | None = None) -> Tensor:
    """See `reference.convolve`. `x`, `weight` `[N, C, 3, 3]`, `skip` and `out` are channels-last; C divides by 64."""
    _, channels, height, width = x.shape
    wide = weight.shape[0]
    block = 128 if wide >= 128 else 64
    pixels = TensorDescriptor.from_tensor(x[0].permute(1, 2, 0), [ROWS, COLUMNS, INNER])
    taps = TensorDescriptor.from_tensor(weight.permute(0, 2, 3, 1).flatten(1), [block, INNER])
    grid = (triton.cdiv(wide, block), triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS))
    _convolve[grid](
        pixels, taps, bias, skip, out, height, width, C=channels, N=wide, ROWS=ROWS, COLUMNS=COLUMNS,
        BLOCK_N=block, INNER=INNER, SKIP=skip is not None, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
