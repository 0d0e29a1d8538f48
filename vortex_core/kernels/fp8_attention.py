"""Attention of a step in fp8: queries, keys and values packed in one pass, then both products in 8 bits.

A program keeps a few queries and their sums, and reads all keys and values once (Dao et al., 2022). Values are packed
with each 16 keys in another order: the order in which the first product leaves weights in registers. So the second
product can take them, and threads exchange nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .card import card
from .launch import early, follow
from .rotary import rotated
from .scaled_tensor import FP8_MAX, SMALLEST, TILE, Heads

_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)
_LIFT = tl.constexpr(8)  # weights are multiplied by 2**8, to use fp8's range
ROWS = 64  # queries of a program
BESIDE = 4096  # bytes of shared memory besides the tiles
LOG2_E = 1.4426950408889634


@triton.jit
def _reordered(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """`[ROWS, KEYS]` with the keys of each 16 as `Heads.v` has them."""
    x = tl.permute(tl.reshape(x, [ROWS, KEYS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(x, [ROWS, KEYS])


@triton.jit(do_not_specialize=["boundary", "T"])
def _pack_rotated(
    qkv, stride_b, stride_t, first_q, first_k, second_q, second_k, boundary, cos, sin, q, k, unit, T,
    H: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    token, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, second, out = first_q, second_q, q
    if kind == 1:
        first, second, out = first_k, second_k, k
    channel = tl.arange(0, C)
    before, after = tl.load(first + channel).to(tl.float32), tl.load(second + channel).to(tl.float32)
    # no value exceeds it: after the norm a head's sum of squares is C, and rotation keeps that
    bound = tl.maximum(tl.max(tl.maximum(tl.abs(before), tl.abs(after)), 0) * C**0.5, _SMALLEST) / _FP8_MAX
    if token == 0:
        tl.store(unit + kind, bound)
    head = tl.arange(0, BLOCK_H)
    mask, spot = (head < H)[:, None], head[:, None] * C + channel[None, :]
    place = qkv + token // T * stride_b + token % T * stride_t + kind * (H * C)
    x = tl.load(place + spot, mask=mask, other=0.0).to(tl.float32)
    weight = tl.where(token % T < boundary, before, after) / bound
    x = rotated(x, weight, cos, sin, token % T, C, BLOCK_H)
    tl.store(out + token * (H * C) + spot, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _pack_values(
    qkv, stride_b, stride_t, v, v_scale, T,
    H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, channel = part * TILE + tl.arange(0, TILE), tl.arange(0, C)
    row = qkv + batch * stride_b + token.to(tl.int64)[:, None] * stride_t + (2 * H + head) * C
    x = tl.load(row + channel[None, :], mask=(token < T)[:, None], other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST) / _FP8_MAX
    plane, parts = batch * H + head, tl.num_programs(0)
    tl.store(v_scale + plane * parts + part, unit)
    small = _reordered(tl.trans((x * (1 / unit)).to(v.dtype.element_ty)), C, TILE)
    place = v + (plane * C + channel)[:, None] * (parts * TILE) + part * TILE + tl.arange(0, TILE)[None, :]
    tl.store(place, small)


@triton.jit
def _part(
    summed, total, most, before, query, k, v, v_scale, part, first, plane, T, limit, factor,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    COPIES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add the keys and values of one tile to what was summed so far; the `LAST` tile is not full."""
    parts = tl.cdiv(T, TILE)
    key = tiles.load(k, first + part * TILE, plane % H * C, limit, H * C, TILE, C, COPIES)
    score = tl.dot(query, key.T)
    if LAST:
        score = tl.where((part * TILE + tl.arange(0, TILE) < T)[None, :], score, -float("inf"))
    now = tl.maximum(most, tl.max(score, 1) * factor)
    weight = tl.exp2(score * factor - (now - _LIFT)[:, None])
    fade = tl.exp2(most - now)
    total = total * fade + tl.sum(weight, 1)
    unit = tl.load(v_scale + plane * parts + part)
    value = tiles.load(v, plane * C, part * TILE, (plane + 1) * C, parts * TILE, C, TILE, COPIES)
    product = tl.dot(_reordered(weight.to(value.dtype), ROWS, TILE), value.T)
    # Added here, in fp32: tensor cores cut sums of fp8 to some 14 bits, which loses over many tiles.
    # Sums are in units of the values' scale, and are rescaled where that changes.
    summed = product + summed * (fade * (before / unit))[:, None]
    return summed, total, now, unit


@triton.jit(do_not_specialize=["T", "limit"])
def _attend(
    q, k, v, v_scale, unit, out, out_b, out_t, T, limit, factor,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    start, head, batch = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    plane, first = batch * H + head, batch * T
    query = tiles.load(q, first + start, head * C, limit, H * C, ROWS, C, COPIES)
    factor *= tl.load(unit) * tl.load(unit + 1)
    summed, total = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS], tl.float32)
    most, before = tl.full([ROWS], -float("inf"), tl.float32), tl.load(v_scale + plane * tl.cdiv(T, TILE))
    full = T // TILE
    for part in range(full):
        summed, total, most, before = _part(
            summed, total, most, before, query, k, v, v_scale, part, first, plane, T, limit, factor,
            H, C, ROWS, TILE, COPIES, False,
        )  # fmt: skip
    if full * TILE < T:
        summed, total, most, before = _part(
            summed, total, most, before, query, k, v, v_scale, full, first, plane, T, limit, factor,
            H, C, ROWS, TILE, COPIES, True,
        )  # fmt: skip
    row = start + tl.arange(0, ROWS)
    place = out + batch.to(tl.int64) * out_b + row.to(tl.int64)[:, None] * out_t + head * C + tl.arange(0, C)[None, :]
    tl.store(place, (summed * (before / total)[:, None]).to(out.dtype.element_ty), mask=(row < T)[:, None])


def pack_heads(qkv: Tensor, norms: Sequence[Tensor], boundary: int, cos: Tensor, sin: Tensor, heads: Heads) -> None:
    """See `reference.pack_heads`. `qkv[b, t]` and the tables are contiguous."""
    batch, tokens, _, count, channels = qkv.shape
    strides = qkv.stride(0), qkv.stride(1)
    _pack_rotated[(batch * tokens, 2)](
        qkv, *strides, *norms, boundary, cos, sin, heads.q, heads.k, heads.unit, tokens,
        H=count, C=channels, BLOCK_H=triton.next_power_of_2(count), num_warps=4, **early(heads.q),
    )  # fmt: skip
    _pack_values[(heads.v_scale.shape[2], count, batch)](
        qkv, *strides, heads.v, heads.v_scale, tokens, H=count, C=channels, TILE=TILE, num_warps=8, **early(heads.v)
    )


def attend_heads(heads: Heads, out: Tensor) -> None:
    """See `reference.attend_heads`."""
    batch, tokens, count, channels = heads.q.shape
    known = card(out.device)
    pair = 2 * TILE * channels * heads.k.element_size()
    grid = (triton.cdiv(tokens, ROWS), count, batch)
    fits = ROWS * channels * heads.q.element_size() + 3 * pair + BESIDE <= known.shared
    # with 2 stages three programs share a multiprocessor; a round of three takes 4/3 of the time of a round of two
    rounds_of_three, rounds_of_two = (triton.cdiv(prod(grid), known.processors * share) for share in (3, 2))
    stages = 3 if fits and 3 * rounds_of_two <= 4 * rounds_of_three else 2
    q, k = (x.flatten(0, 1).flatten(1) for x in (heads.q, heads.k))
    _attend[grid](
        tiles.source(q, ROWS, channels, copies=known.copies), tiles.source(k, TILE, channels, copies=known.copies),
        tiles.source(heads.v.flatten(0, 2), channels, TILE, copies=known.copies), heads.v_scale, heads.unit,
        out, out.stride(0), out.stride(1), tokens, batch * tokens, channels**-0.5 * LOG2_E,
        H=count, C=channels, ROWS=ROWS, TILE=TILE, COPIES=known.copies,
        num_warps=4, num_stages=stages, **early(heads.q),
    )  # fmt: skip
