"""The device memory that calls work in: one block of a planned size, from which torch's own allocator serves them.

A private pool of torch's allocator holds one free block. While a call is inside `use`, whatever it allocates is cut
from that block and goes back to it, so ordinary torch code runs in memory of a fixed size, what torch reserves does
not grow, and no tensor of the caller's can lie in the middle of the block and break it up. Between calls the block is
held as one tensor, so that it counts as allocated, and nobody takes it for a cache to be emptied.

The first allocations inside `use` lie at the block's start, one after the other: what was captured there (a CUDA graph)
stays valid until `epoch` changes, if calls begin with the same ones.

Needs the allocator's native backend. Under cudaMallocAsync (ComfyUI's default on many cards) pools are not supported:
calls then allocate as usual, and the plan is an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .vram import counters


class Workspace:
    """See the module. `nbytes` is the block's size, 0 while there is none; `epoch` counts the blocks there were."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        self.epoch = 0
        self._pooled = device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"
        self._pool: torch.cuda.MemPool | None = None
        self._held: Tensor | None = None
        self._inside: AbstractContextManager[None] | None = None

    def reserve(self, nbytes: int) -> None:
        """Have a block of at least `nbytes`. Raises torch's `OutOfMemoryError`; then there is none."""
        if not self._pooled or nbytes <= self.nbytes:
            return
        self.release()
        with torch.cuda.device(self.device):
            self._pool = torch.cuda.MemPool()
        try:
            try:
                self._hold(nbytes)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # which torch does not do itself for a private pool
                self._hold(nbytes)
        except torch.OutOfMemoryError:
            self.release()
            raise
        self.nbytes = nbytes
        self.epoch += 1

    def release(self) -> None:
        """Give the block back to the driver."""
        self._held = self._pool = None
        self.nbytes = 0
        if self._pooled:
            torch.cuda.empty_cache()

    @contextmanager
    def use(self) -> Iterator[None]:
        """What this thread allocates here comes from the block; it must be gone at the end."""
        if self._pool is None:
            yield
            return
        self._held = None
        self._inside = self._routed()
        self._inside.__enter__()
        try:
            yield
        except BaseException:
            self._leave()
            self.release()  # the traceback keeps tensors alive in the block
            raise
        self._leave()
        before = counters(self.device).reserved
        self._hold(self.nbytes)
        if counters(self.device).reserved > before:  # something is still alive in the block
            self.release()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside `use`: for a while, allocate as usual. For what is handed out, and for the caller's own code."""
        if self._inside is None:
            yield
            return
        self._leave()
        try:
            yield
        finally:
            self._inside = self._routed()
            self._inside.__enter__()

    def _routed(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pool is None else torch.cuda.use_mem_pool(self._pool, self.device)

    def _leave(self) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(None, None, None)

    def _hold(self, nbytes: int) -> None:
        with self._routed():
            self._held = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
