"""Loads tiles of a matrix: by the bulk copy engine, through descriptors, where a card has one, else by plain loads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def load(x, row, column, limit, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COPIES: tl.constexpr):
    """The tile `[ROWS, COLUMNS]` at `row` and `column`; zeros from row `limit` on."""
    if COPIES:
        tile = x.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        place = rows.to(tl.int64)[:, None] * stride + column + tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(x + place, mask=(rows < limit)[:, None], other=0.0)
    return tile


def source(x: Tensor, rows: int, columns: int, *, copies: bool) -> Tensor | TensorDescriptor:
    """A matrix with contiguous rows as `load` takes it, for tiles of `rows` x `columns`."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if copies else x
