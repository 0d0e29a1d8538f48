"""The CUDA streams of a device, and cuBLAS' workspaces for them: one set a process, for all engines.

torch hands out streams of a pool in turn, and cuBLAS keeps a workspace for each thread and stream that it multiplied
on. So streams are made once, until the process ends, and products run on one thread (device/worker.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .vram import Counters, counters


class Streams(NamedTuple):
    """The streams that Vortex uses on a device besides the default one."""

    side: torch.cuda.Stream
    capture: torch.cuda.Stream
    copy: torch.cuda.Stream


LARGEST = 64 * 2**20  # bytes that a workspace may take; 33 MiB on Hopper, 9 on earlier cards

_lock = threading.Lock()
_streams: dict[int, Streams] = {}  # by card


def streams_of(device: torch.device) -> Streams | None:
    """The streams of a device; None on the CPU."""
    if device.type != "cuda":
        return None
    with _lock:
        if (index := device.index or 0) not in _streams:
            _streams[index] = Streams(*(torch.cuda.Stream(device) for _ in Streams._fields))
        return _streams[index]


@cache
def blas_of(device: torch.device) -> Blas:
    """The one `Blas` of a device."""
    return Blas(device)


class Blas:
    """cuBLAS' workspaces for the default stream and others of a device, on the worker's thread.

    `generation` counts how often they moved. `torch._C._cuda_clearCublasWorkspaces`, which torch.compile's graphs call,
    frees all of the process' workspaces; a captured step would go on writing to memory that others use by then. torch
    does not tell a workspace's address, but its counters show that it allocates one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.generation = device, 0
        self._sizes: dict[torch.cuda.Stream, int] = {}  # bytes that each took when it was allocated
        self._factors: tuple[Tensor, ...] = ()

    def nbytes(self, streams: Iterable[torch.cuda.Stream]) -> int:
        """Bytes of the workspaces for the default stream and these, as `ensure` saw them."""
        return sum(self._sizes.get(stream, 0) for stream in {*self._default(), *streams})

    def ensure(self, streams: Iterable[torch.cuda.Stream]) -> Counters:
        """Make sure that the default stream and these have workspaces, and count a generation where they moved.

        Returns torch's counters afterwards.
        """
        wanted, now = [*self._default(), *streams], counters(self.device)
        if not wanted:
            return now
        if not self._factors:
            square = torch.zeros(16, 16, dtype=torch.bfloat16, device=self.device)
            self._factors = square[0].clone(), square, square.clone(), torch.empty_like(square)
            now = counters(self.device)
        before = now.allocated
        if self._sizes.keys() >= set(wanted):
            self.multiply(wanted[-1])  # all are freed together, so one product tells
            last, now = before, counters(self.device)
            before = now.allocated
            if before == last:
                return now
        self.generation += 1
        for stream in wanted:
            self.multiply(stream)
            now = counters(self.device)
            taken, before = now.allocated - before, now.allocated
            if taken > LARGEST:  # another thread allocated meanwhile
                taken = next(filter(None, self._sizes.values()), LARGEST // 2)
            # none taken: a workspace of an ended thread is used again, which is not ours
            self._sizes[stream] = taken if taken > 0 else self._sizes.get(stream, 0)
        return now

    def multiply(self, stream: torch.cuda.Stream) -> None:
        """Run one product of cuBLASLt and one of cuBLAS on a stream: each takes its workspace there."""
        bias, x, w, out = self._factors
        with torch.cuda.stream(stream):
            torch.addmm(bias, x, w, out=out)
            torch.mm(x, w, out=out)

    def _default(self) -> tuple[torch.cuda.Stream, ...]:
        return (torch.cuda.default_stream(self.device),) if self.device.type == "cuda" else ()


class Order:
    """Has a caller's stream and the worker's, the default one, wait for each other. On the CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter(self) -> None:
        """Make the device this thread's current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def default(self) -> torch.cuda.Stream:
        """The worker's stream."""
        return torch.cuda.default_stream(self.device)

    def on_default(self) -> AbstractContextManager[Any]:
        """Inside, the default stream is this thread's current one, whatever a function that a job asked for has set."""
        return torch.cuda.stream(self.default()) if self.device.type == "cuda" else nullcontext()

    def foreign(self) -> torch.cuda.Stream | None:
        """The caller's current stream, or None where it is the worker's."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self.device)
        return None if stream == self.default() else stream

    def follow(self, caller: torch.cuda.Stream | None, value: object = None) -> None:
        """Have the worker's stream wait for what the caller has launched, and use the tensors in `value`."""
        if caller is not None:
            self._wait(self.default(), caller, value)

    def lead(self, caller: torch.cuda.Stream | None, value: object = None) -> None:
        """Have the caller's stream wait for what the worker has launched, and use the tensors in `value`."""
        if caller is not None:
            self._wait(caller, self.default(), value)

    def _wait(self, waiter: torch.cuda.Stream, other: torch.cuda.Stream, value: object) -> None:
        waiter.wait_stream(other)
        for tensor in _tensors(value):
            if tensor.device == self.device:
                tensor.record_stream(waiter)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
