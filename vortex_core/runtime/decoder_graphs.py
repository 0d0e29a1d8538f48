"""Decodes of the latest sizes, captured as CUDA graphs, where the decoder's convolutions are the library's.

Those take longer to launch than to run: 19 ms instead of 7 for a picture of 512 x 512 on an H200. A graph is found by
the addresses that it uses, as a step's is (runtime/graphs.py): those of the maps in the arena, and of weights.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from typing import Any

import torch

from ..device.streams import streams_of
from ..device.vram import counters
from ..memory.arena import round_up
from ..memory.offload import Act
from .graphs import POOL, PiecewiseGraph

KEPT = 4
Key = tuple[int | None, ...]  # height, width, rows of a strip, addresses


class DecoderGraphs:
    """`reserved`: bytes that torch has reserved for them; `planned`: those that were planned."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.reserved, self.planned = device, 0, 0
        self._graphs: OrderedDict[Key, PiecewiseGraph] = OrderedDict()
        self._pool: Any = None

    def launch(self, key: Key, run: Act, allocates: int) -> None:
        """`run`, or replay what it launched when it ran for the same `key`. It allocates at most so many bytes."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.replay()
            return
        run()
        needed = round_up(allocates, POOL)
        if needed > self.planned or any(other[3:] != key[3:] for other in self._graphs):
            self.clear()  # the pool is made for the largest, and graphs of other places are not valid any more
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        before = counters(self._device).reserved
        try:
            self._graphs[key] = self._record(run)
        except BaseException:
            self.clear()  # with the pool, which the failed capture may have broken
            raise
        self.reserved += max(0, counters(self._device).reserved - before)
        self.planned = max(self.planned, needed)
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)

    def _record(self, run: Act) -> PiecewiseGraph:
        streams, graph = streams_of(self._device), PiecewiseGraph(self._pool)
        assert streams is not None
        gc.collect()  # now, since a finalizer might do what a capture forbids
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(streams.capture), graph.capture():
            run()
        return graph

    def clear(self) -> None:
        """Drop every graph; `hand_back` then frees what they kept."""
        self._graphs.clear()
        self._pool, self.reserved, self.planned = None, 0, 0
