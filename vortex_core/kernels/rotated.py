"""What Triton kernels share that rotate: the product with the table, and how its results are put in order.

A block of 128 is two rows of that product, its halves, since one table of 64 x 64 does for both widths. Rows and
columns are arranged so that a thread ends up with both halves of a block, and with 16 neighbours of each. Then threads
exchange nothing, and store 16 bytes: all that is permuted here are names of registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rotation

HALF = tl.constexpr(rotation.HALF)
_ROUND = tl.constexpr(1.5 * 2**23)  # added to a small number, it leaves the nearest integer in the lowest bits
FEWEST = 16 * rotation.HALF  # values that a product takes at least
_TOGETHER = tl.constexpr(8)  # blocks, whose first halves are rows that follow each other


@triton.jit
def rounded(x):
    """int8 nearest to fp32 `x`, ties to even; `x` is below 2**22."""
    return (x + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def load_table(table):
    """`rotation.table`, or `shuffled_table`, `[64, 64]`."""
    index = tl.arange(0, HALF)
    return tl.load(table + index[:, None] * HALF + index[None, :])


@triton.jit
def rows_of(values, PARTS: tl.constexpr):
    """The rows of the product, `[B * PARTS, 64]`, of `values` of B blocks that follow each other; B is 8 n."""
    BLOCKS: tl.constexpr = values.numel // (PARTS * HALF)
    if PARTS == 2:
        values = tl.reshape(values, [BLOCKS // _TOGETHER, _TOGETHER, PARTS, HALF])
        values = tl.permute(values, [0, 2, 1, 3])
    return tl.reshape(values, [BLOCKS * PARTS, HALF])


@triton.jit
def halves(product, PARTS: tl.constexpr):
    """Rotated blocks from the product of `rows_of`: their first and second halves `[B, 64]`; narrow ones twice."""
    BLOCKS: tl.constexpr = product.shape[0] // PARTS
    first, second = product, product
    if PARTS == 2:
        product = tl.reshape(product, [BLOCKS // _TOGETHER, PARTS, _TOGETHER, HALF])
        even, odd = tl.split(tl.permute(product, [0, 2, 3, 1]))
        first, second = tl.reshape(even + odd, [BLOCKS, HALF]), tl.reshape(even - odd, [BLOCKS, HALF])
    return first, second


@triton.jit
def in_order(x):
    """`[B, 64]` with columns as the shuffled table has them, 8 t + 2 c + i, in their own order, 16 c + 2 t + i."""
    x = tl.permute(tl.reshape(x, [x.shape[0], 8, 4, 2]), [0, 2, 1, 3])
    return tl.reshape(x, [x.shape[0], HALF])
