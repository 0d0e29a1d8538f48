"""From the updates of several LoRA files to the adapter of one weight: rows find their factors, ranks lie side by side.

Ranks are rounded up to buckets, so that another file of about the same rank has factors of the same shape, in the same
place: a captured step goes on being valid. What is asked of values in host memory, numpy answers, on this thread alone:
torch's threads would meet for each of hundreds of tensors, and where cores are busy, that takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import frexp

import numpy as np
import torch
from torch import Tensor

from ..errors import VortexCheckpointError
from ..kernels import Adapter
from ..kernels.adapter import LEAST, ROWS, arranged
from ..memory.arena import round_up
from .adapters import LowRank

WIDE = 64  # ranks from which buckets are that wide
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
Updates = Sequence[Sequence[LowRank]]  # of each file, for one matrix
Span = tuple[int, int, list[tuple[int, LowRank]]]  # rows from and to, and their updates with their files


def adapter_of(updates: Updates, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Adapter:
    """The adapter of a weight of `shape` `[N, K]`, with factors in `dtype`; strengths are 0.

    `updates` are in host memory. On `meta` only shapes count. Raises `VortexCheckpointError` for rows that no part can
    begin with.
    """
    n, k = shape
    spans = list(_spans(updates, n))
    ranks = _ranks(spans)
    up = torch.zeros(n, ranks, dtype=dtype, device=device)
    down = torch.zeros(len(spans), ranks, k, dtype=dtype, device=device)
    scale = torch.zeros(len(spans), ranks, device=device)
    part = torch.zeros(-(-n // ROWS), dtype=torch.int32, device=device)
    for p, (start, stop, inside) in enumerate(spans if device.type != "meta" else ()):
        part[start // ROWS : -(-stop // ROWS)] = p
        first = 0
        for _, update in inside:
            last, rows = first + update.rank, slice(start - update.rows.start, stop - update.rows.start)
            shift = _shift(update)
            up[start:stop, first:last] = update.up[rows].to(device).float() * 2.0**shift
            down[p, first:last] = update.down.to(device).float() * 2.0**-shift
            first = last
    return Adapter(up, arranged(down), part, scale)


def extent(updates: Updates, n: int) -> tuple[int, int]:
    """Parts and ranks of the adapter of a weight with `n` rows: the shape of its `scale`."""
    spans = list(_spans(updates, n))
    return len(spans), _ranks(spans)


def owners(updates: Updates, n: int) -> list[int]:
    """Of each value of `Adapter.scale`, row after row, the file whose strength it is; -1: none's."""
    spans = list(_spans(updates, n))
    ranks, found = _ranks(spans), []
    for *_, inside in spans:
        own = [file for file, update in inside for _ in range(update.rank)]
        found += own + [-1] * (ranks - len(own))
    return found


def bucket(rank: int) -> int:
    """The ranks that are laid out for `rank`."""
    return max(LEAST, round_up(rank, LEAST if rank <= WIDE else WIDE))


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor of 16 or 32 bits in host memory, not finite if a value is not; 0 for none."""
    bits = tensor.detach().reshape(-1).view(BITS[tensor.dtype]).numpy()
    # bits are in the order of magnitudes; as signed numbers negative values come first, as unsigned ones last
    negative = bits.view(f"u{bits.itemsize}").max(initial=0) & np.iinfo(bits.dtype).max
    most = max(int(bits.max(initial=0)), int(negative))
    return torch.tensor(most, dtype=BITS[tensor.dtype]).view(tensor.dtype).item()


def _ranks(spans: Sequence[Span]) -> int:
    return bucket(max((sum(one.rank for _, one in inside) for *_, inside in spans), default=0))


def _spans(updates: Updates, n: int) -> Iterator[Span]:
    """The parts of a weight's rows that have the same updates."""
    every = [(file, update) for file, several in enumerate(updates) for update in several]
    edges = sorted({0, n, *(edge for _, update in every for edge in (update.rows.start, update.rows.stop))})
    if any(edge % ROWS for edge in edges[:-1]):
        raise VortexCheckpointError(
            f"A LoRA begins at row {next(e for e in edges if e % ROWS)} of a weight of {n} rows."
        )
    for start, stop in pairwise(edges):
        yield start, stop, [(f, u) for f, u in every if u.rows.start <= start and stop <= u.rows.stop]


def _shift(update: LowRank) -> int:
    """The power of two that `up` takes from `down`: largest values are alike then, and none is lost in 16 bits."""
    up, down = largest(update.up), largest(update.down)
    return (frexp(down)[1] - frexp(up)[1]) // 2 if up and down else 0
