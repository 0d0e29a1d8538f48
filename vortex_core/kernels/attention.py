"""Attention of one wide head, for the decoder's lowest level: 512 channels, where the library's fast ones end at 256.

A program keeps a few queries and their sums, and goes once over all keys and values (Dao et al., 2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import reference
from .card import card

# queries and keys at once, warps, stages; and the tiles that shared memory must have room for, and some bytes more
LAYOUTS = ((64, 8, 1, 2), (32, 4, 2, 3))
MORE = 2560


@triton.jit
def _attend(
    q, k, v, out, tokens, factor, C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    query = q.load([start, 0])
    summed = tl.zeros([ROWS, C], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    for first in range(0, tokens, ROWS):
        score = tl.dot(query, k.load([first, 0]).T) * factor
        score = tl.where((first + tl.arange(0, ROWS) < tokens)[None, :], score, -float("inf"))
        now = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - now[:, None])
        shrink = tl.exp2(most - now)
        total = total * shrink + tl.sum(weight, 1)
        value = v.load([first, 0])
        summed = tl.dot(weight.to(value.dtype), value, summed * shrink[:, None])
        most = now
    out.store([start, 0], (summed / total[:, None]).to(query.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attend`. C is a power of two; in 32 bits, and where a card has no room for it, the library's."""
    tokens, channels = q.shape
    room = (card(q.device).shared - MORE) // (channels * q.element_size())
    fitting = [layout for layout in LAYOUTS if layout[0] * layout[3] <= room and q.element_size() == 2]
    if not fitting:
        return reference.attend(q, k, v)
    rows, warps, stages, _ = fitting[0]
    out = torch.empty_like(q)
    _attend[(triton.cdiv(tokens, rows),)](
        *(TensorDescriptor.from_tensor(x, [rows, channels]) for x in (q, k, v, out)),
        tokens, 1.4426950408889634 * channels**-0.5, C=channels, ROWS=rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
