"""The product of two int8 matrices with int32 sums; scales and bias are applied before the result is rounded once."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .card import Card, card
from .launch import early, follow


class Tile(NamedTuple):
    """Rows of x, rows of the weight, and values of K at once; warps and stages; tiles of M that share a weight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


@triton.jit(do_not_specialize=["M"])
def _multiply(
    x, x_scale, weight, row_scale, bias, out, M, N, x_stride, weight_stride, out_stride, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, COPIES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    # programs that run at the same time share few tiles of either matrix, which stay in the cache
    across = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * across)
    m, n = (group * GROUP + inside % rows) * BLOCK_M, inside // rows * BLOCK_N
    summed = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        left = tiles.load(x, m, k, M, x_stride, BLOCK_M, BLOCK_K, COPIES)
        right = tiles.load(weight, n, k, N, weight_stride, BLOCK_N, BLOCK_K, COPIES)
        summed = tl.dot(left, right.T, summed, out_dtype=tl.int32)
    row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    unit = tl.load(x_scale + row, mask=row < M, other=0.0)
    y = summed.to(tl.float32) * unit[:, None] * tl.load(row_scale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def multiply_int8(
    x: Tensor, x_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """See `reference.multiply_int8`. Values of a row are contiguous, and K is a multiple of 64."""
    (m, k), n = x.shape, len(weight)
    known = card(out.device)
    tile = choose(m, n, k, known)
    _multiply[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        tiles.source(x, tile.m, tile.k, copies=known.copies), x_scale,
        tiles.source(weight, tile.n, tile.k, copies=known.copies), row_scale, bias, out,
        m, n, x.stride(0), weight.stride(0), out.stride(0), K=k,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tile.group, BIAS=bias is not None,
        COPIES=known.copies, num_warps=tile.warps, num_stages=tile.stages, **early(x),
    )  # fmt: skip


def choose(m: int, n: int, k: int, known: Card) -> Tile:
    """The tile for a product `[M, K]` by `[N, K]`."""
    return Tile(128, 128, 64, 8, 3)
