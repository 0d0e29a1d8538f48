"""NF4 to rotated int8, and the scale of each row for that.

A block of 64 codes is rotated by one small product of its levels, in fp16, with the table of +-1: its sums are exact in
fp32, so they are the same on every card. Then each block has its scale, and the two blocks of a wide rotation are added
and subtracted. No two operations are fused into one rounding: results are equal to the reference's, bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nf4 import LEVELS
from . import rotation
from .launch import early, follow
from .rotated import HALF, halves, in_order, load_table, rounded, rows_of
from .scaled_tensor import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_ACROSS = tl.constexpr(8)  # blocks of a row of the weight, that are rotated at once
ROWS = 4  # of the weight, in a program
STEPS = 3  # of a program along a row
WARPS = 4


@triton.jit
def _rotated(packed, absmax, levels, table, factor, start, N, K: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """The first and second halves of rotated blocks, `[ROWS * 8, 64]`: of each row those from block `start` on."""
    BLOCKS: tl.constexpr = K // (PARTS * HALF)  # of a row
    tile = tl.arange(0, ROWS * _ACROSS)
    row, block = tl.program_id(0) * ROWS + tile // _ACROSS, start + tile % _ACROSS
    word = (row * BLOCKS + block)[:, None] * (PARTS * HALF // 8) + tl.arange(0, PARTS * HALF // 8)[None, :]
    codes = tl.load(packed + word, mask=((row < N) & (block < BLOCKS))[:, None], other=0)
    # bytes are little endian and the first value of a byte is its high nibble; a thread keeps the codes of its words
    code = tl.join(codes, codes >> 16)
    code = tl.join(code, code >> 8)
    code = tl.join(code >> 4, code) & 15
    value = tl.gather(levels, tl.reshape(code, [code.numel]), 0)
    product = tl.dot(rows_of(value, PARTS), table)
    tile = tl.arange(0, ROWS * _ACROSS * PARTS)
    row, block = tl.program_id(0) * ROWS + tile // (_ACROSS * PARTS), start + tile % _ACROSS
    unit = absmax + (row * BLOCKS + block) * PARTS + tile // _ACROSS % PARTS
    unit = tl.load(unit, mask=(row < N) & (block < BLOCKS), other=0.0) * factor
    return halves(product * unit[:, None], PARTS)


@triton.jit
def _dequantize(
    packed, absmax, row_scale, levels, table, out, N, K: tl.constexpr, ROOT: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = K // (PARTS * HALF)
    levels, table = tl.load(levels + tl.arange(0, 16)), load_table(table)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS * _ACROSS * PARTS) // (_ACROSS * PARTS)
    factor = tl.div_rn(1.0, tl.load(row_scale + row, mask=row < N, other=1.0) * ROOT)
    tile = tl.arange(0, ROWS * _ACROSS)
    row = tl.program_id(0) * ROWS + tile // _ACROSS
    follow(EARLY)  # only now: what is read before, weights, was there already
    for step in range(STEPS):
        start = (tl.program_id(1) * STEPS + step) * _ACROSS
        first, second = _rotated(packed, absmax, levels, table, factor, start, N, K, PARTS, ROWS)
        block = start + tile % _ACROSS
        mask = ((row < N) & (block < BLOCKS))[:, None]
        place = (row.to(tl.int64) * BLOCKS + block)[:, None] * (PARTS * HALF) + tl.arange(0, HALF)[None, :]
        tl.store(out + place, in_order(rounded(first)), mask=mask)
        if PARTS == 2:
            tl.store(out + place + HALF, in_order(rounded(second)), mask=mask)


@triton.jit
def _row_scales(
    packed, absmax, levels, table, out, N, K: tl.constexpr, UNIT: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    levels, table = tl.load(levels + tl.arange(0, 16)), load_table(table)
    largest = tl.zeros([ROWS], tl.float32)
    for start in range(0, K // (PARTS * HALF), _ACROSS):
        first, second = _rotated(packed, absmax, levels, table, 1.0, start, N, K, PARTS, ROWS)
        now = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
        largest = tl.maximum(largest, tl.max(tl.reshape(now, [ROWS, _ACROSS]), 1))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + row, tl.maximum(largest, _SMALLEST) * UNIT, mask=row < N)


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor) -> None:
    """See `reference.dequantize`. All contiguous."""
    n, k = out.shape
    width = rotation.block(k)
    grid = triton.cdiv(n, ROWS), triton.cdiv(k // width, STEPS * _ACROSS.value)
    _dequantize[grid](
        packed.view(torch.int32), absmax, row_scale, *_tables(packed.device), out, n, K=k, ROOT=width**0.5,
        PARTS=width // rotation.HALF, ROWS=ROWS, STEPS=STEPS, num_warps=WARPS, enable_fp_fusion=False, **early(out),
    )  # fmt: skip


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """See `reference.row_scales`, for int8. All contiguous."""
    n, k = len(out), packed.shape[1] * 2
    _row_scales[(triton.cdiv(n, ROWS),)](
        packed.view(torch.int32), absmax, *_tables(packed.device), out, n, K=k, UNIT=rotation.unit(k),
        PARTS=rotation.block(k) // rotation.HALF, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device, dtype=torch.float16)


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return _levels(device), rotation.shuffled_table(device, torch.float16)
