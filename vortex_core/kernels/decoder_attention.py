"""Attention of one wide head, for the decoder's lowest level: 512 channels; the library's fast kernels end at 256.

A program keeps a few queries and their sums, and reads all keys and values once (Dao et al., 2022).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import reference, tiles
from .card import card

LAYOUTS = ((64, 8, 1, 2), (32, 4, 2, 3))  # queries and keys at once, warps, stages; and tiles in shared memory
BESIDE = 2560  # bytes of shared memory besides the tiles


@triton.jit(do_not_specialize=["tokens"])
def _attend(q, k, v, out, tokens, factor, C: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr):
    start = tl.program_id(0) * ROWS
    query = tiles.load(q, start, 0, tokens, C, ROWS, C, COPIES)
    summed = tl.zeros([ROWS, C], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    for first in range(0, tokens, ROWS):
        score = tl.dot(query, tiles.load(k, first, 0, tokens, C, ROWS, C, COPIES).T) * factor
        score = tl.where((first + tl.arange(0, ROWS) < tokens)[None, :], score, -float("inf"))
        now = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - now[:, None])
        shrink = tl.exp2(most - now)
        total = total * shrink + tl.sum(weight, 1)
        value = tiles.load(v, first, 0, tokens, C, ROWS, C, COPIES)
        summed = tl.dot(weight.to(value.dtype), value, summed * shrink[:, None])
        most = now
    row = start + tl.arange(0, ROWS)
    place = out + row[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(place, (summed / total[:, None]).to(query.dtype), mask=(row < tokens)[:, None])


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """See `reference.attend`, which is used in 32 bits and where shared memory is too small. C is a power of two."""
    tokens, channels = q.shape
    known = card(q.device)
    room = (known.shared - BESIDE) // (channels * q.element_size())
    fitting = [layout for layout in LAYOUTS if layout[0] * layout[3] <= room and q.element_size() == 2]
    if not fitting:
        reference.attend(q, k, v, out)
        return
    rows, warps, stages, _ = fitting[0]
    _attend[(triton.cdiv(tokens, rows),)](
        *(tiles.source(x, rows, channels, copies=known.copies) for x in (q, k, v)),
        out, tokens, 1.4426950408889634 * channels**-0.5,
        C=channels, ROWS=rows, COPIES=known.copies, num_warps=warps, num_stages=stages,
    )  # fmt: skip
