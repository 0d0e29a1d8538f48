"""NF4 to rotated int8, and the scale of each row for that.

A block of 64 codes is rotated by one small product of its levels, in fp16, with the table of +-1: its sums are exact in
fp32, so they are the same on every card. Then each block has its scale, and the two blocks of a wide rotation are added
and subtracted. They are decoded apart, so that threads exchange nothing for it. No two operations are fused into one
rounding: results are equal to the reference's, bit for bit.
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
from .scaled_tensor import SMALLEST

_HALF = tl.constexpr(rotation.HALF)
_SMALLEST = tl.constexpr(SMALLEST)
_ROUND = tl.constexpr(1.5 * 2**23)  # added to a small number, it leaves the nearest integer in the lowest bits
BLOCKS = 64  # rotated by a program that decodes
ROW_BLOCKS = 32  # of a row, that are rotated at once to find its scale
WARPS = 4


@triton.jit
def rounded(x):
    """int8 nearest to fp32 `x`, ties to even; `x` is below 2**22."""
    return (x + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _halves(packed, absmax, levels, table, block, mask, part: tl.constexpr, PARTS: tl.constexpr):
    """fp32 `[BLOCKS, 64]`: half `part` of each block, rotated and scaled. `mask` is of blocks."""
    half = block * PARTS + part
    word = half[:, None] * (_HALF // 8) + tl.arange(0, _HALF // 8)[None, :]
    codes = tl.load(packed + word, mask=mask[:, None], other=0)
    scale = tl.load(absmax + half, mask=mask, other=0.0)
    # bytes are little endian and the first value of a byte is its high nibble: 4, 0, 12, 8, ...
    shift = (tl.arange(0, 8) ^ 1) * 4
    code = (codes[:, :, None] >> shift[None, None, :]) & 15
    value = tl.gather(levels, tl.reshape(code, [code.numel]), 0)
    return tl.dot(tl.reshape(value, [block.shape[0], _HALF]), table) * scale[:, None]


@triton.jit
def _rotated(packed, absmax, levels, table, block, mask, PARTS: tl.constexpr):
    """The halves of rotated blocks, without 1 / sqrt(width); of narrow blocks twice the same."""
    first = _halves(packed, absmax, levels, table, block, mask, 0, PARTS)
    second = first
    if PARTS == 2:
        odd = _halves(packed, absmax, levels, table, block, mask, 1, PARTS)
        first, second = first + odd, first - odd
    return first, second


@triton.jit
def _table(levels, table):
    """The 16 levels, and the table `[64, 64]`."""
    index = tl.arange(0, _HALF)
    return tl.load(levels + tl.arange(0, 16)), tl.load(table + index[:, None] * _HALF + index[None, :])


@triton.jit
def _dequantize(
    packed, absmax, row_scale, levels, table, out, blocks, ROOT: tl.constexpr,
    BLOCKS_A_ROW: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    levels, table = _table(levels, table)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < blocks
    factor = tl.div_rn(1.0, tl.load(row_scale + block // BLOCKS_A_ROW, mask=mask, other=1.0) * ROOT)
    first, second = _rotated(packed, absmax, levels, table, block, mask, PARTS)
    place = out + block.to(tl.int64)[:, None] * (PARTS * _HALF) + tl.arange(0, _HALF)[None, :]
    follow(EARLY)  # only now: what is read before, weights, was there already
    tl.store(place, rounded(first * factor[:, None]), mask=mask[:, None])
    if PARTS == 2:
        tl.store(place + _HALF, rounded(second * factor[:, None]), mask=mask[:, None])


@triton.jit
def _row_scales(
    packed, absmax, levels, table, out, UNIT: tl.constexpr,
    BLOCKS_A_ROW: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    levels, table = _table(levels, table)
    row = tl.program_id(0)
    largest = tl.zeros([BLOCKS], tl.float32)
    for start in range(0, BLOCKS_A_ROW, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        mask = block < BLOCKS_A_ROW
        first, second = _rotated(packed, absmax, levels, table, row * BLOCKS_A_ROW + block, mask, PARTS)
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1))
    tl.store(out + row, tl.maximum(tl.max(largest, 0), _SMALLEST) * UNIT)


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor) -> None:
    """See `reference.dequantize`. All contiguous."""
    n, k = out.shape
    width = rotation.block(k)
    blocks = n * k // width
    _dequantize[(triton.cdiv(blocks, BLOCKS),)](
        packed.view(torch.int32), absmax, row_scale, *_tables(packed.device), out, blocks, ROOT=width**0.5,
        BLOCKS_A_ROW=k // width, PARTS=width // rotation.HALF, BLOCKS=BLOCKS,
        num_warps=WARPS, enable_fp_fusion=False, **early(out),
    )  # fmt: skip


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """See `reference.row_scales`, for int8. All contiguous."""
    k = packed.shape[1] * 2
    width = rotation.block(k)
    _row_scales[(len(out),)](
        packed.view(torch.int32), absmax, *_tables(packed.device), out, UNIT=rotation.unit(k),
        BLOCKS_A_ROW=k // width, PARTS=width // rotation.HALF, BLOCKS=ROW_BLOCKS,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device, dtype=torch.float16)


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return _levels(device), rotation.table(device, torch.float16)
