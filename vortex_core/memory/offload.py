"""Where weights live: on the device, or in pinned host memory and streamed through a pair of staging buffers.

A weight group is a module (or a few) whose tensors are views of one flat buffer, so that moving it is one copy. A
resident group's buffer is on the device. A streamed one's is in host memory; a `Prefetcher` brings it to one of two
device buffers just before it runs, on a stream of its own, while the group before it computes. Both compute the same,
bit for bit: only the place of the bytes differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..device.streams import streams_of
from .arena import Region, aligned
from .host_memory import HostMemory

log = logging.getLogger(__name__)

Act = Callable[[], None]


def nbytes(*modules: nn.Module) -> int:
    """Bytes that the parameters and buffers of `modules` take."""
    return sum(t.numel() * t.element_size() for module in modules for t in _tensors(module))


class WeightGroup:
    """Modules that move together, and the flat buffer their tensors are views of.

    `device` is its buffer there while it is resident. `host` is its copy in host memory, which it keeps once it
    `streams`: weights do not change, so that leaving the device again costs nothing.
    """

    def __init__(self, name: str, part: str, *modules: nn.Module) -> None:
        self.name, self.part, self.modules = name, part, modules
        self.device: Tensor | None = None
        self.host: Tensor | None = None
        self.streams = False
        self.nbytes = 0
        self._slots: list[tuple[Tensor, int, tuple[int, ...]]] = []  # each tensor, its offset in the buffer, strides

    def measure(self) -> int:
        """Lay the tensors out; the bytes of the buffer they need."""
        self._slots, self.nbytes = [], 0
        for module in self.modules:
            for tensor in _tensors(module):
                strides = torch.empty_like(tensor, device="meta").stride()  # dense, channels last if it was
                self._slots.append((tensor, self.nbytes, strides))
                self.nbytes += aligned(tensor.numel() * tensor.element_size())
        return self.nbytes

    def settle(self, *, device: Tensor | None = None, host: Tensor | None = None) -> None:
        """Move the modules' tensors into one of these buffers."""
        self.measure()  # anew: on `meta` they were others
        self.device, self.host, self.streams = device, host, host is not None
        buffer = host if device is None else device
        assert buffer is not None
        for tensor, view in self._views(buffer):
            view.copy_(tensor.data)
            tensor.data = view

    def bind(self, buffer: Tensor) -> None:
        """Turn the tensors into views of `buffer` (uint8, at least `nbytes`)."""
        for tensor, view in self._views(buffer):
            tensor.data = view

    def _views(self, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for tensor, offset, strides in self._slots:
            span = buffer[offset : offset + tensor.numel() * tensor.element_size()]
            yield tensor, span.view(tensor.dtype).as_strided(tensor.shape, strides)

    def to_device(self, device: torch.device) -> None:
        """Make it resident. Raises torch's `OutOfMemoryError`, unchanged."""
        assert self.host is not None
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        buffer.copy_(self.host)
        self.bind(buffer)
        self.device = buffer
        if not self.streams:
            self.host = None

    def to_host(self, memory: HostMemory | None = None) -> None:
        """Leave the device. In `memory` from now on, if it is to stream from there; without, until it returns."""
        here = self.host if self.device is None else self.device
        if self.host is None or (memory is not None and not self.streams):
            self.streams = memory is not None
            self.host = torch.empty(self.nbytes, dtype=torch.uint8) if memory is None else memory.take(self.nbytes)
            assert here is not None
            self.host.copy_(here)
        self.bind(self.host)
        self.device = None


class CopyStream:
    """Copies to the device beside the products. On the CPU nothing runs beside anything: copies are done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, streams = device, streams_of(device)
        self._stream = None if streams is None else streams.copy

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy, once all that was launched so far is done; a token for `wait`."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, token: torch.cuda.Event | None) -> None:
        """What is launched from now on runs after the copy."""
        if token is not None:
            torch.cuda.current_stream(self._device).wait_event(token)


class Prefetcher:
    """Brings streamed groups to the device, each just before it runs, one ahead.

    Every other group shares one of two buffers as large as the largest. Units run in the order given, any number of
    rounds; another order works too, only without overlap.
    """

    def __init__(self, groups: Sequence[WeightGroup], device: torch.device, copies: CopyStream | None = None) -> None:
        self.groups = list(groups)
        self._copies = copies or CopyStream(device)
        self._buffers: list[Tensor] = []
        self._inside: list[int | None] = [None, None]  # the group in each buffer
        self._copied: list[Any] = [None, None]
        self._left = 0  # rounds to come
        self._take: Callable[[Act], None] = lambda act: act()
        self._hooks = [
            hook
            for k, group in enumerate(self.groups)
            for hook in (
                group.modules[0].register_forward_pre_hook(lambda *_, k=k: self._take(partial(self._arrive, k))),
                group.modules[0].register_forward_hook(lambda *_, k=k: self._take(partial(self._leave, k))),
            )
        ]

    @contextmanager
    def open(self, region: Region, rounds: int = 1) -> Iterator[None]:
        """Take the buffers from `region`, and have groups run in `rounds` rounds."""
        if not self.groups:
            yield
            return
        size = max(group.nbytes for group in self.groups)
        count = min(2, len(self.groups))
        self._buffers = [region.take((size,), torch.uint8) for _ in range(count)]
        for k, group in enumerate(self.groups):
            group.bind(self._buffers[k % 2])
        self._left = rounds
        try:
            for k in range(count):
                self._fetch(k)
            yield
        finally:
            for inside, token in zip(self._inside, self._copied, strict=True):
                if inside is not None:
                    self._copies.wait(token)  # before the buffer is anybody's
            for group in self.groups:
                assert group.host is not None
                group.bind(group.host)
            self._buffers, self._inside, self._copied = [], [None, None], [None, None]

    @contextmanager
    def handed(self, take: Callable[[Act], None]) -> Iterator[None]:
        """Inside, what is due before and after each group is not done: `take` gets it, in order, to do it later."""
        at_once, self._take = self._take, take
        try:
            yield
        finally:
            self._take = at_once

    def close(self) -> None:
        """Let go of the groups."""
        for hook in self._hooks:
            hook.remove()

    def _arrive(self, k: int) -> None:
        self._fetch(k)
        self._copies.wait(self._copied[k % 2])

    def _leave(self, k: int) -> None:
        following = k + 2
        if following >= len(self.groups):
            following = k % 2
            if k == len(self.groups) - 1:
                self._left -= 1
            if self._left <= int(k < len(self.groups) - 1):
                return
        self._fetch(following)

    def _fetch(self, k: int) -> None:
        if self._inside[k % 2] == k:
            return
        group = self.groups[k]
        assert group.host is not None
        self._copied[k % 2] = self._copies.copy(self._buffers[k % 2][: group.nbytes], group.host)
        self._inside[k % 2] = k


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
