"""NF4 with the low-rank update of LoRAs, to 16 bits, fp8 or rotated int8: both are added in fp32, and rounded once.

A program takes some rows of a weight, all of one part, and goes along some blocks of K: it looks up their levels, and
adds a small product of the rows' factors. So an update moves no activation and no decoded weight, and costs R / M of a
product's operations.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nf4 import BLOCK, LEVELS
from . import rotation
from .adapter import ROWS, Adapter
from .launch import early, follow
from .rotated import load_table, rounded
from .scaled_tensor import FP8_MAX, SMALLEST

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(ROWS)
_SMALLEST = tl.constexpr(SMALLEST)
FEW = 16  # rows of a program that looks for the largest value
WARPS = 4


class Tile(NamedTuple):
    """Rows of a program, at most 64; blocks along a row, or pairs of them where they are rotated; warps."""

    rows: int
    steps: int
    warps: int


PLAIN = Tile(64, 4, 4)
ROTATED, MANY = Tile(64, 2, 4), Tile(32, 4, 4)  # to int8; of more than 32 ranks at once, which would not fit registers


@triton.jit
def _block(packed, absmax, levels, table, row, block, K: tl.constexpr, N, ROTATED: tl.constexpr):
    """One NF4 block of each row, fp32 `[rows, 64]`; rotated by the table of +-1, if so."""
    BLOCKS: tl.constexpr = K // _BLOCK
    place, inside = row * BLOCKS + block, row < N
    word = place.to(tl.int64)[:, None] * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)[None, :]
    codes = tl.load(packed + word, mask=inside[:, None], other=0)
    # bytes are little endian and the first value of a byte is its high nibble
    code = tl.join(codes, codes >> 16)
    code = tl.join(code, code >> 8)
    code = tl.join(code >> 4, code) & 15
    value = tl.reshape(tl.gather(levels, tl.reshape(code, [code.numel]), 0), [row.shape[0], _BLOCK])
    if ROTATED:
        value = tl.dot(value.to(table.dtype), table)
    return value * tl.load(absmax + place, mask=inside, other=0.0)[:, None]


@triton.jit
def _left(up, scale, row, part, start, N, R, RANKS: tl.constexpr):
    """Some ranks of the rows' own factors, times their strengths, `[rows, RANKS]`."""
    r = start + tl.arange(0, RANKS)
    left = tl.load(up + row[:, None] * R + r[None, :], mask=(row < N)[:, None] & (r < R)[None, :], other=0.0)
    strength = tl.load(scale + part * R + r, mask=r < R, other=0.0)
    return (left.to(tl.float32) * strength[None, :]).to(left.dtype)


@triton.jit
def _right(down, part, start, column, R, K: tl.constexpr, RANKS: tl.constexpr):
    """Those ranks of the other factor, at 64 columns, `[RANKS, 64]`."""
    r = start + tl.arange(0, RANKS)
    place = (part * R + r).to(tl.int64)[:, None] * K + column + tl.arange(0, _BLOCK)[None, :]
    return tl.load(down + place, mask=(r < R)[:, None], other=0.0)


@triton.jit
def _update(left, up, down, scale, row, part, column, N, R, K: tl.constexpr, RANKS: tl.constexpr):
    """The update of 64 columns of each row, fp32 `[rows, 64]`; `left` has the first ranks, often all."""
    found = tl.dot(left, _right(down, part, 0, column, R, K, RANKS), input_precision="ieee")
    for start in range(RANKS, R, RANKS):
        more = _left(up, scale, row, part, start, N, R, RANKS)
        found = tl.dot(more, _right(down, part, start, column, R, K, RANKS), found, input_precision="ieee")
    return found


@triton.jit
def _adapted(
    packed, absmax, levels, table, left, up, down, scale, row, part, block, N, R,
    K: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, ROTATED: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Block `block` of each row with its update: its two halves, of a block of 64 twice the same."""
    even = _block(packed, absmax, levels, table, row, block * PARTS, K, N, ROTATED)
    update = _update(left, up, down, scale, row, part, block * PARTS * _BLOCK, N, R, K, RANKS)
    first = even * ROOT + update
    second = first
    if PARTS == 2:
        odd = _block(packed, absmax, levels, table, row, block * PARTS + 1, K, N, ROTATED)
        first = (even + odd) * ROOT + update
        second = _update(left, up, down, scale, row, part, (block * PARTS + 1) * _BLOCK, N, R, K, RANKS)
        second += (even - odd) * ROOT
    return first, second


@triton.jit(do_not_specialize=["R"])
def _decode(
    packed, absmax, row_scale, levels, table, out, up, down, part, scale, N, R,
    K: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, ROTATED: tl.constexpr,
    ROOT: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    levels, mine = tl.load(levels + tl.arange(0, 16)), tl.load(part + tl.program_id(0) * ROWS // _ROWS)
    if ROTATED:
        table = load_table(table)
    left = _left(up, scale, row, mine, 0, N, R, RANKS)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if SCALED:
        factor = 1 / tl.load(row_scale + row, mask=row < N, other=1.0)
    follow(EARLY)  # only now: what is read before, weights, was there already
    for step in range(STEPS):
        block = tl.program_id(1) * STEPS + step
        if block < K // (PARTS * _BLOCK):
            first, second = _adapted(
                packed, absmax, levels, table, left, up, down, scale, row, mine, block, N, R,
                K, RANKS, PARTS, ROTATED, ROOT,
            )  # fmt: skip
            place = row.to(tl.int64)[:, None] * K + block * (PARTS * _BLOCK) + tl.arange(0, _BLOCK)[None, :]
            first, second = first * factor[:, None], second * factor[:, None]
            if ROTATED:
                tl.store(out + place, rounded(first), mask=(row < N)[:, None])
                second = rounded(second)
            else:
                tl.store(out + place, first.to(out.dtype.element_ty), mask=(row < N)[:, None])
            if PARTS == 2:
                tl.store(out + place + _BLOCK, second.to(out.dtype.element_ty), mask=(row < N)[:, None])


@triton.jit(do_not_specialize=["R"])
def _largest(
    packed, absmax, levels, table, out, up, down, part, scale, N, R, UNIT: tl.constexpr,
    K: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, ROTATED: tl.constexpr, ROOT: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * FEW + tl.arange(0, FEW)
    levels, mine = tl.load(levels + tl.arange(0, 16)), tl.load(part + tl.program_id(0) * FEW // _ROWS)
    if ROTATED:
        table = load_table(table)
    left = _left(up, scale, row, mine, 0, N, R, RANKS)
    largest = tl.zeros([FEW], tl.float32)
    for block in range(K // (PARTS * _BLOCK)):
        first, second = _adapted(
            packed, absmax, levels, table, left, up, down, scale, row, mine, block, N, R,
            K, RANKS, PARTS, ROTATED, ROOT,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1))
    tl.store(out + row, tl.maximum(largest, _SMALLEST) * UNIT, mask=row < N)


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None, adapter: Adapter) -> None:
    """See `reference.dequantize`. All contiguous; N is a multiple of 16, K of 64."""
    n, k = out.shape
    rotated = out.dtype == torch.int8
    width = rotation.block(k) if rotated else BLOCK
    ranks = _ranks(adapter)
    tile = PLAIN if not rotated else ROTATED if ranks <= 32 else MANY
    grid = triton.cdiv(n, tile.rows), triton.cdiv(k // width, tile.steps)
    _decode[grid](
        packed.view(torch.int32), absmax, row_scale, *_tables(packed.device), out, *adapter, n, adapter.up.shape[1],
        K=k, RANKS=ranks, PARTS=width // BLOCK, SCALED=row_scale is not None, ROTATED=rotated,
        ROOT=width**-0.5 if rotated else 1.0, ROWS=tile.rows, STEPS=tile.steps, num_warps=tile.warps, **early(out),
    )  # fmt: skip


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter) -> None:
    """See `reference.row_scales`."""
    n, k = len(out), packed.shape[1] * 2
    rotated = dtype == torch.int8
    width = rotation.block(k) if rotated else BLOCK
    _largest[(triton.cdiv(n, FEW),)](
        packed.view(torch.int32), absmax, *_tables(packed.device), out, *adapter, n, adapter.up.shape[1],
        UNIT=1 / (rotation.INT8_MAX if rotated else FP8_MAX), K=k, RANKS=_ranks(adapter), PARTS=width // BLOCK,
        ROTATED=rotated, ROOT=width**-0.5 if rotated else 1.0, FEW=FEW, num_warps=WARPS,
    )  # fmt: skip


def _ranks(adapter: Adapter) -> int:
    """Ranks that are added at once: all, or 64."""
    return min(64, triton.next_power_of_2(adapter.up.shape[1]))


@cache
def levels(device: torch.device) -> Tensor:
    """NF4's, fp32 `[16]`."""
    return torch.tensor(LEVELS, device=device)


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return levels(device), rotation.table(device, torch.float16)
