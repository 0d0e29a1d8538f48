"""From the updates of several LoRA files to the adapter of one weight: rows find their factors, ranks lie side by side.

Ranks are rounded up to buckets, so that another file of about the same rank has factors of the same shape, in the same
place: a captured step goes on being valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import frexp

import torch
from torch import Tensor

from ..errors import VortexCheckpointError
from ..kernels import Adapter
from ..kernels.adapter import LEAST, ROWS, arranged
from ..memory.arena import round_up
from .adapters import LowRank

WIDE = 64  # ranks from which buckets are that wide
Updates = Sequence[Sequence[LowRank]]  # of each file, for one matrix


def adapter_of(updates: Updates, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Adapter:
    """The adapter of a weight of `shape` `[N, K]`, with factors in `dtype`; `scale_of` gives its strengths, now 0.

    On `meta` only shapes count. Raises `VortexCheckpointError` for rows that no part can begin with.
    """
    n, k = shape
    spans = list(_spans(updates, n))
    ranks = bucket(max((sum(one.rank for _, one in inside) for *_, inside in spans), default=0))
    up = torch.zeros(n, ranks, dtype=dtype, device=device)
    down = torch.zeros(len(spans), ranks, k, dtype=dtype, device=device)
    scale = torch.zeros(len(spans), ranks, device=device)
    part = torch.zeros(-(-n // ROWS), dtype=torch.int32, device=device)
    for p, (start, stop, inside) in enumerate(spans if device.type != "meta" else ()):
        part[start // ROWS : -(-stop // ROWS)] = p
        first = 0
        for _, update in inside:
            last, rows = first + update.rank, slice(start - update.rows.start, stop - update.rows.start)
            left, right = _balanced(update.up.to(device).float(), update.down.to(device).float())
            up[start:stop, first:last] = left[rows]
            down[p, first:last] = right
            first = last
    return Adapter(up, arranged(down), part, scale)


def scale_of(updates: Updates, n: int, strengths: Sequence[float]) -> Tensor:
    """`Adapter.scale` for these strengths, one for each file, in host memory."""
    spans = list(_spans(updates, n))
    ranks = [[update.rank for _, update in inside] for *_, inside in spans]
    scale = torch.zeros(len(spans), bucket(max(map(sum, ranks), default=0)))
    for place, counts, (*_, inside) in zip(scale, ranks, spans, strict=True):
        own = torch.tensor([strengths[file] for file, _ in inside])
        place[: sum(counts)] = own.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    return scale


def bucket(rank: int) -> int:
    """The ranks that are laid out for `rank`."""
    return max(LEAST, round_up(rank, LEAST if rank <= WIDE else WIDE))


def _spans(updates: Updates, n: int) -> Iterator[tuple[int, int, list[tuple[int, LowRank]]]]:
    """The parts of a weight's rows that have the same updates: start, stop, and those updates with their files."""
    every = [(file, update) for file, several in enumerate(updates) for update in several]
    edges = sorted({0, n, *(edge for _, update in every for edge in (update.rows.start, update.rows.stop))})
    if any(edge % ROWS for edge in edges[:-1]):
        raise VortexCheckpointError(
            f"A LoRA begins at row {next(e for e in edges if e % ROWS)} of a weight of {n} rows."
        )
    for start, stop in pairwise(edges):
        yield start, stop, [(f, u) for f, u in every if u.rows.start <= start and stop <= u.rows.stop]


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with largest values alike, so that none is lost in 16 bits; multiplied by powers of two."""
    largest = float(up.abs().max()), float(down.abs().max())
    if not all(largest):
        return up, down
    shift = (frexp(largest[1])[1] - frexp(largest[0])[1]) // 2
    return up * 2.0**shift, down * 2.0**-shift
