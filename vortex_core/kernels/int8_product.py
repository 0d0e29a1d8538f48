"""The product of two int8 matrices with int32 sums; scales and bias are applied before the result is rounded once.

Where a card has a bulk copy engine, a program goes through many tiles of the result: it fetches the next tile's
operands while it scales and stores the last one. Two programs share a multiprocessor, so that one multiplies while the
other stores. Elsewhere, and for few rows, each tile has a program of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .card import Card, card
from .launch import early, follow


class Tile(NamedTuple):
    """Rows of x, rows of the weight, and values of K at once; warps, stages, programs that share a multiprocessor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    share: int = 1
    flows: bool = False  # a program goes through many of them


LOADED = Tile(128, 128, 64, 8, 3)  # 96 KB of shared memory at most, no spills; on cards without the copy engine
FLOWING = Tile(128, 128, 128, 4, 3, share=2, flows=True)
FEWER = Tile(64, 128, 128, 4, 3, share=3)
FEWEST = Tile(64, 128, 128, 4, 5)  # where not even every multiprocessor gets one: more is fetched ahead
ROUND_OF_FEWER = 0.89  # time of a round of `FEWER`, where one of `FLOWING` takes 1 (H200)
GROUP = 8  # tiles that follow each other and share a weight


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a tile. Tiles that are made together share operands, which stay in the cache."""
    across = tl.cdiv(N, BLOCK_N)
    group = tile // (across * GROUP)
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    inside = tile % (across * GROUP)
    return (group * GROUP + inside % rows) * BLOCK_M, inside // rows * BLOCK_N


@triton.jit
def _scaled(summed, x_scale, row_scale, bias, m, n, M, N, BIAS: tl.constexpr):
    row, column = m + tl.arange(0, summed.shape[0]), n + tl.arange(0, summed.shape[1])
    y = summed.to(tl.float32) * tl.load(x_scale + row, mask=row < M, other=0.0)[:, None]
    y *= tl.load(row_scale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _store(y, out, m, n, M, N, stride):
    row, column = m + tl.arange(0, y.shape[0]), n + tl.arange(0, y.shape[1])
    place = out + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _multiply(
    x, x_scale, weight, row_scale, bias, out, M, N, K, x_stride, weight_stride, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    m, n = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    summed = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        left = tiles.load(x, m, k, M, x_stride, BLOCK_M, BLOCK_K, COPIES)
        right = tiles.load(weight, n, k, N, weight_stride, BLOCK_N, BLOCK_K, COPIES)
        summed = tl.dot(left, right.T, summed, out_dtype=tl.int32)
    _store(_scaled(summed, x_scale, row_scale, bias, m, n, M, N, BIAS), out, m, n, M, N, out_stride)


@triton.jit(do_not_specialize=["M"])
def _multiply_flowing(
    x, x_scale, weight, row_scale, bias, out, M, N, K, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `_multiply`, by the copy engine; with `COPIES` it stores too, and `out` is a descriptor."""
    follow(EARLY)
    count = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        m, n = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        summed = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            left, right = x.load([m, k * BLOCK_K]), weight.load([n, k * BLOCK_K])
            summed = tl.dot(left, right.T, summed, out_dtype=tl.int32)
        # in halves, which take fewer registers
        halves = tl.permute(tl.reshape(summed, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        first, second = tl.split(halves)
        first = _scaled(first, x_scale, row_scale, bias, m, n, M, N, BIAS)
        if COPIES:
            out.store([m, n], first.to(out.dtype))
        else:
            _store(first, out, m, n, M, N, out_stride)
        n += BLOCK_N // 2
        second = _scaled(second, x_scale, row_scale, bias, m, n, M, N, BIAS)
        if COPIES:
            out.store([m, n], second.to(out.dtype))
        else:
            _store(second, out, m, n, M, N, out_stride)


def multiply_int8(
    x: Tensor, x_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """See `reference.multiply_int8`. Values of a row are contiguous, and K is a multiple of 64."""
    known = card(out.device)
    rows = rows_first(len(x), len(weight), known)
    _launch(x[:rows], x_scale[:rows], weight, row_scale, bias, out[:rows], known)
    if rows < len(x):
        _launch(x[rows:], x_scale[rows:], weight, row_scale, bias, out[rows:], known)


def choose(m: int, n: int, known: Card) -> Tile:
    """The tile for a product `[M, K]` by `[N, K]`: of which all programs need the fewest rounds."""
    if not known.copies or known.shared < FLOWING.share * _bytes(FLOWING):
        return LOADED
    if _count(m, n, FEWEST) <= known.processors:
        return FEWEST
    flowing, fewer = (-(-_count(m, n, tile) // (tile.share * known.processors)) for tile in (FLOWING, FEWER))
    return FEWER if fewer * ROUND_OF_FEWER < flowing else FLOWING


def rows_first(m: int, n: int, known: Card) -> int:
    """Rows of x that are multiplied first: all, or whole rounds, if the last round would be nearly empty."""
    tile = choose(m, n, known)
    slots = tile.share * known.processors
    rounds, left = divmod(_count(m, n, tile), slots)
    if not tile.flows or rounds == 0 or not 0 < left <= slots // 4:
        return m
    return rounds * slots // -(-n // tile.n) * tile.m


def _bytes(tile: Tile) -> int:
    """Of shared memory, for the operands of all stages."""
    return tile.stages * (tile.m + tile.n) * tile.k


def _count(m: int, n: int, tile: Tile) -> int:
    return -(-m // tile.m) * -(-n // tile.n)


def _launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor, known: Card
) -> None:
    (m, k), n = x.shape, len(weight)
    tile = choose(m, n, known)
    left, right = (tiles.source(y, rows, tile.k, copies=known.copies) for y, rows in ((x, tile.m), (weight, tile.n)))
    options = {
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP, "BIAS": bias is not None,
        "num_warps": tile.warps, "num_stages": tile.stages, **early(x),
    }  # fmt: skip
    if tile.flows:
        stores = out.element_size() == 2
        target = tiles.source(out, tile.m, tile.n // 2, copies=stores)
        _multiply_flowing[(min(_count(m, n, tile), tile.share * known.processors),)](
            left, x_scale, right, row_scale, bias, target, m, n, k, out.stride(0), COPIES=stores, **options
        )
        return
    _multiply[(_count(m, n, tile),)](
        left, x_scale, right, row_scale, bias, out, m, n, k, x.stride(0), weight.stride(0), out.stride(0),
        COPIES=known.copies, **options,
    )  # fmt: skip
