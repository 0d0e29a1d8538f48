"""The CUDA streams of a device, and the workspaces that cuBLAS keeps for them: one set a process, for all engines.

torch takes streams out of a pool in turn, and cuBLAS keeps a workspace for each that it ever multiplied on, in each
thread. So streams are made once, and products run on one thread (device/worker.py).
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
    """Those that Vortex uses on a device, beside the default one."""

    side: torch.cuda.Stream
    capture: torch.cuda.Stream
    copy: torch.cuda.Stream


LARGEST = 64 * 2**20  # bytes that a workspace may take; 33 MiB on Hopper, 9 on earlier cards

_lock = threading.Lock()
_streams: dict[int, Streams] = {}


def streams_of(device: torch.device) -> Streams | None:
    """The streams of a device, made once a process; None on the CPU."""
    if device.type != "cuda":
        return None
    with _lock:
        if (index := device.index or 0) not in _streams:
            _streams[index] = Streams(*(torch.cuda.Stream(device) for _ in Streams._fields))
        return _streams[index]


@cache
def blas_of(device: torch.device) -> Blas:
    """What is known of cuBLAS' workspaces on a device."""
    return Blas(device)


class Blas:
    """cuBLAS' workspaces for the default stream and others of a device, on the thread that multiplies.

    `generation` counts how often they were found to be elsewhere: `torch._C._cuda_clearCublasWorkspaces`, which
    torch.compile's graphs call, frees all of them for the whole process, and a captured step would go on writing to
    memory that is somebody else's. torch tells no address, but it tells that it allocates.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.generation = device, 0
        self._sizes: dict[torch.cuda.Stream, int] = {}  # bytes, as they were when they came
        self._factors: tuple[Tensor, ...] = ()

    def nbytes(self, streams: Iterable[torch.cuda.Stream]) -> int:
        """Bytes of the workspaces for the default stream and these, as `ensure` saw them."""
        return sum(self._sizes.get(stream, 0) for stream in {*self._default(), *streams})

    def ensure(self, streams: Iterable[torch.cuda.Stream]) -> Counters:
        """See to it that there are workspaces for the default stream and these, and that they are where they were.

        What torch has allocated and reserved then.
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
            self.multiply(wanted[-1])  # they are freed all together, so one tells of all
            last, now = before, counters(self.device)
            before = now.allocated
            if before == last:
                return now
        self.generation += 1
        for stream in wanted:
            self.multiply(stream)
            now = counters(self.device)
            taken, before = now.allocated - before, now.allocated
            if taken > LARGEST:  # somebody else allocated meanwhile
                taken = next(filter(None, self._sizes.values()), LARGEST // 2)
            # what was there before is of a thread that has ended, and not ours
            self._sizes[stream] = taken if taken > 0 else self._sizes.get(stream, 0)
        return now

    def multiply(self, stream: torch.cuda.Stream) -> None:
        """A product of cuBLASLt's and one of cuBLAS' own on a stream: each asks for its workspace there."""
        bias, x, w, out = self._factors
        with torch.cuda.stream(stream):
            torch.addmm(bias, x, w, out=out)
            torch.mm(x, w, out=out)

    def _default(self) -> tuple[torch.cuda.Stream, ...]:
        return (torch.cuda.default_stream(self.device),) if self.device.type == "cuda" else ()


class Order:
    """How a caller's stream and the worker's, the default one, wait for each other; on the CPU none is foreign."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter(self) -> None:
        """Make the device this thread's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def default(self) -> torch.cuda.Stream:
        """The worker's."""
        return torch.cuda.default_stream(self.device)

    def on_default(self) -> AbstractContextManager[Any]:
        """Inside, the default stream is this thread's, as it is outside of functions that are asked for."""
        return torch.cuda.stream(self.default()) if self.device.type == "cuda" else nullcontext()

    def foreign(self) -> torch.cuda.Stream | None:
        """The caller's stream where it is not the one that the worker uses."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self.device)
        return None if stream == self.default() else stream

    def follow(self, caller: torch.cuda.Stream | None, value: object = None) -> None:
        """Let the worker's work wait for what the caller has launched, and use `value`."""
        if caller is not None:
            self._wait(self.default(), caller, value)

    def lead(self, caller: torch.cuda.Stream | None, value: object = None) -> None:
        """Let the caller's work wait for what the worker has launched, and use `value`."""
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
