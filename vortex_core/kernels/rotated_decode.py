"""NF4 to rotated int8, and the scale of each row for that.

A block of 64 codes is rotated by one small product of its levels, in fp16, with the table of +-1: its sums are exact in
fp32, so they are the same on every card. Then each block has its scale, and the two blocks of a wide rotation are added
and subtracted. No two operations are fused into one rounding: results are equal to the reference's, bit for bit.

A program is one warp, which waits for no other. Its threads look levels up in each other's registers, and each has codes
of the blocks whose sums it gets: the rows of the table are in the order in which the codes lie. A program goes through
many tiles of 16 blocks, two at once, so that the table is read seldom.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nf4 import BLOCK, LEVELS
from . import rotation
from .card import card
from .launch import early, follow
from .rotated import HALF, in_order, load_table, rounded
from .scaled_tensor import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_TILE = tl.constexpr(16)  # blocks of 64 in a tile
PROGRAMS = 14  # of a multiprocessor, at once
REGISTERS = 144  # of a thread; compilers for 8.6 and 8.9 take fewer by themselves, and spill


@triton.jit
def _blocks(tile, half: tl.constexpr, N, K: tl.constexpr, WIDE: tl.constexpr):
    """The indices of 8 blocks of a tile, and whether they exist.

    Where pairs of blocks are rotated together, the first of each pair, or the second; else the first 8, or the others.
    """
    ACROSS: tl.constexpr = (K // HALF + _TILE - 1) // _TILE
    tile, index = tl.zeros([8], tl.int32) + tile, tl.arange(0, 8)
    row = tile // ACROSS
    block = tile % ACROSS * _TILE + (index * 2 + half if WIDE else index + half * 8)
    return row * (K // HALF) + block, (row < N) & (block < K // HALF)


@triton.jit
def _levels_of(packed, levels, tile, N, K: tl.constexpr, WIDE: tl.constexpr):
    """The levels of a tile's codes, fp16 `[16, 64]`: both halves of `_blocks`, values in the order of the table's rows."""
    first, some = _blocks(tile, 0, N, K, WIDE)
    second, others = _blocks(tile, 1, N, K, WIDE)
    word = tl.arange(0, 4)[None, :]  # of 64 bits, 16 codes
    first = tl.load(packed + first[:, None] * 4 + word, mask=some[:, None], other=0)
    second = tl.load(packed + second[:, None] * 4 + word, mask=others[:, None], other=0)
    words = tl.join(first, second)
    # bytes are little endian and the first value of a byte is its high nibble
    code = tl.join(words.to(tl.int32), (words >> 32).to(tl.int32))
    code = tl.join(code, code >> 16)
    code = tl.join(code, code >> 8)
    code = tl.join(code >> 4, code) & 15
    value = tl.gather(levels, tl.reshape(code, [code.numel]), 0)
    value = tl.permute(tl.reshape(value, [8, 4, 2, 4, 4]), [2, 0, 3, 1, 4])
    return tl.reshape(value, [_TILE, HALF])


@triton.jit
def _two(a, b):
    return tl.reshape(tl.permute(tl.join(a, b), [2, 0, 1]), [2 * a.shape[0], a.shape[1]])


@triton.jit
def _apart(x):
    """The upper and the lower half of the rows."""
    return tl.split(tl.permute(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), [1, 2, 0]))


@triton.jit
def _rotated(product, absmax, factor, tile, N, K: tl.constexpr, WIDE: tl.constexpr):
    """A tile's blocks, two times `[8, 64]`, without 1 / sqrt(width)."""
    block, some = _blocks(tile, 0, N, K, WIDE)
    other, others = _blocks(tile, 1, N, K, WIDE)
    first, second = _apart(product)
    first *= (tl.load(absmax + block, mask=some, other=0.0) * factor)[:, None]
    second *= (tl.load(absmax + other, mask=others, other=0.0) * factor)[:, None]
    if WIDE:
        first, second = first + second, first - second
    return first, second


@triton.jit
def _write(product, absmax, row_scale, out, tile, N, K: tl.constexpr, ROOT: tl.constexpr, WIDE: tl.constexpr):
    block, some = _blocks(tile, 0, N, K, WIDE)
    other, others = _blocks(tile, 1, N, K, WIDE)
    factor = tl.div_rn(1.0, tl.load(row_scale + block // (K // HALF), mask=some, other=1.0) * ROOT)
    first, second = _rotated(product, absmax, factor, tile, N, K, WIDE)
    column = tl.arange(0, HALF)[None, :]
    tl.store(out + block.to(tl.int64)[:, None] * HALF + column, in_order(rounded(first)), mask=some[:, None])
    tl.store(out + other.to(tl.int64)[:, None] * HALF + column, in_order(rounded(second)), mask=others[:, None])


@triton.jit
def _dequantize(
    packed, absmax, row_scale, levels, table, out, N, K: tl.constexpr, ROOT: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (K // HALF + _TILE - 1) // _TILE
    levels, table = tl.load(levels + tl.arange(0, 16)), load_table(table)
    follow(EARLY)
    for pair in tl.range(tl.program_id(0), tl.cdiv(N * ACROSS, 2), tl.num_programs(0), num_stages=1):
        tile = pair * 2
        values = _two(_levels_of(packed, levels, tile, N, K, WIDE), _levels_of(packed, levels, tile + 1, N, K, WIDE))
        first, second = _apart(tl.dot(values, table))
        _write(first, absmax, row_scale, out, tile, N, K, ROOT, WIDE)
        _write(second, absmax, row_scale, out, tile + 1, N, K, ROOT, WIDE)


@triton.jit
def _row_scales(packed, absmax, levels, table, out, N, K: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr):
    ACROSS: tl.constexpr = (K // HALF + _TILE - 1) // _TILE
    levels, table = tl.load(levels + tl.arange(0, 16)), load_table(table)
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=1):
        largest = tl.zeros([8, HALF], tl.float32)
        for tile in tl.range(row * ACROSS, (row + 1) * ACROSS, num_stages=1):
            product = tl.dot(_levels_of(packed, levels, tile, N, K, WIDE), table)
            first, second = _rotated(product, absmax, 1.0, tile, N, K, WIDE)
            largest = tl.maximum(largest, tl.maximum(tl.abs(first), tl.abs(second)))
        tl.store(out + row, tl.maximum(tl.max(tl.max(largest, 1), 0), _SMALLEST) * UNIT)


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor) -> None:
    """See `reference.dequantize`. All contiguous."""
    n, k = out.shape
    pairs = triton.cdiv(n * triton.cdiv(k // BLOCK, _TILE.value), 2)
    _dequantize[(min(pairs, PROGRAMS * card(out.device).processors),)](
        packed.view(torch.int64), absmax, row_scale, *_tables(packed.device), out, n, K=k,
        ROOT=rotation.block(k) ** 0.5, WIDE=rotation.block(k) > BLOCK,
        num_warps=1, maxnreg=REGISTERS, enable_fp_fusion=False, **early(out),
    )  # fmt: skip


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """See `reference.row_scales`, for int8. All contiguous."""
    n, k = len(out), packed.shape[1] * 2
    _row_scales[(min(n, PROGRAMS * card(out.device).processors),)](
        packed.view(torch.int64), absmax, *_tables(packed.device), out, n, K=k, UNIT=rotation.unit(k),
        WIDE=rotation.block(k) > BLOCK, num_warps=1, maxnreg=REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device, dtype=torch.float16)


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return _levels(device), rotation.shuffled_table(device, torch.float16, rows=True)
