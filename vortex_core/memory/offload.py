"""Where weights live: on the device, or in pinned host memory and streamed through a pair of staging buffers.

A weight group is a module (or a few) whose tensors are views of one flat buffer, so that moving it is one copy. A
resident group's buffer is on the device, a streamed group's is in host memory. A group that is resident as a copy has
its packed weights in host memory, and what they decode to on the device. A `Prefetcher` copies a streamed group
to one of two device buffers just before it runs, on a stream of its own, while the group before it computes. Results
are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..device.streams import streams_of
from .arena import Region, Shape, aligned, laid_out
from .host_memory import HostMemory

Act = Callable[[], None]


def nbytes(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers of `modules`, without rounding."""
    return sum(t.numel() * t.element_size() for module in modules for t in _tensors(module))


@runtime_checkable
class Expandable(Protocol):
    """A module whose `packing` can be in host memory while it computes with what that decodes to."""

    @property
    def packing(self) -> tuple[Tensor, ...]: ...
    @property
    def decoded(self) -> Shape | None: ...
    def expand(self, out: Tensor | None) -> None: ...


class WeightGroup:
    """Modules that move together, and the flat buffer that their tensors are views of.

    `device` is the buffer on the device, while the group is resident; `host` that in host memory. A group that has been
    streamed (`streams`) keeps `host`: weights do not change, so it can leave the device again without a copy. So does
    one that is resident as a copy (`expanded`).
    """

    def __init__(self, name: str, part: str, *modules: nn.Module) -> None:
        self.name, self.part, self.modules = name, part, modules
        self.device: Tensor | None = None
        self.host: Tensor | None = None
        self.streams = self.expanded = False
        self.nbytes = self.copied = 0  # of the packed weights, and of a copy; 0 where there can be none
        self._slots: list[tuple[Tensor, int, tuple[int, ...]]] = []  # tensor, offset, strides

    def measure(self) -> int:
        """Lay the tensors out, and return the bytes of buffer that they need."""
        self._slots, self.nbytes = [], 0
        for module in self.modules:
            for tensor in _tensors(module):
                strides = torch.empty_like(tensor, device="meta").stride()  # dense, channels last if it was
                self._slots.append((tensor, self.nbytes, strides))
                self.nbytes += aligned(tensor.numel() * tensor.element_size())
        decoded = [part.decoded for part in self._expandable()]
        rest = [(tuple(tensor.shape), tensor.dtype) for tensor in self._unpacked()]
        shapes = [shape for shape in decoded if shape is not None]
        self.copied = laid_out([*shapes, *rest]) if shapes and len(shapes) == len(decoded) else 0
        return self.nbytes

    @property
    def held(self) -> int:
        """Bytes of a resident group on the device."""
        return self.copied if self.expanded else self.nbytes

    def settle(self, *, device: Tensor | None = None, host: Tensor | None = None) -> None:
        """Move the modules' tensors into the buffer that is given, on the device or in host memory."""
        self.measure()  # again: the tensors on `meta` were others
        self.device, self.host, self.streams = device, host, host is not None
        buffer = host if device is None else device
        assert buffer is not None
        for tensor, view in self._views(buffer):
            view.copy_(tensor.data)
            tensor.data = view

    def relayout(self, memory: HostMemory | None = None) -> None:
        """Lay the tensors out anew, where the group is, after some were added or removed. It must be packed.

        `memory`: for a group that streams. On torch's `OutOfMemoryError` it lies where it lay.
        """
        assert not self.expanded
        home = torch.device("cpu") if self.device is None else self.device.device
        before = self._slots, self.nbytes, self.copied
        size = self.measure()
        try:
            if self.device is None and self.streams:
                assert memory is not None
                buffer = memory.take(size)
            else:
                buffer = torch.empty(size, dtype=torch.uint8, device=home)
        except BaseException:
            self._slots, self.nbytes, self.copied = before
            raise
        for tensor, view in self._views(buffer):
            view.copy_(tensor.data)
            tensor.data = view
        # another copy would be of the tensors before
        self.device, self.host = (None, buffer) if self.device is None else (buffer, None)
        self.streams = self.streams and self.device is None

    @contextmanager
    def visiting(self, device: torch.device) -> Iterator[None]:
        """Inside, the group's tensors are on `device`, wherever it is at home; what is written to them stays."""
        if self.device is not None:
            yield
            return
        assert self.host is not None
        buffer = self.host.to(device)
        self.bind(buffer)
        try:
            yield
            self.host.copy_(buffer)
        finally:
            self.bind(self.host)

    def bind(self, buffer: Tensor) -> None:
        """Make the tensors views of `buffer` (uint8, at least `nbytes`)."""
        for tensor, view in self._views(buffer):
            tensor.data = view

    def _views(self, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for tensor, offset, strides in self._slots:
            span = buffer[offset : offset + tensor.numel() * tensor.element_size()]
            yield tensor, span.view(tensor.dtype).as_strided(tensor.shape, strides)

    def to_device(self, device: torch.device) -> None:
        """Make the group resident, packed. Raises torch's `OutOfMemoryError`, and nothing has changed."""
        assert self.host is not None
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        buffer.copy_(self.host)
        self._collapse()
        self.bind(buffer)
        self.device = buffer
        if not self.streams:
            self.host = None

    def to_host(self, memory: HostMemory | None = None) -> None:
        """Leave the device: for `memory`, to stream from there, or without one until `to_device` brings it back."""
        buffer = self.host if self.device is None or self.expanded else self.device
        if self.host is None or (memory is not None and not self.streams):
            self.streams = memory is not None
            self.host = torch.empty(self.nbytes, dtype=torch.uint8) if memory is None else memory.take(self.nbytes)
            assert buffer is not None
            self.host.copy_(buffer)
        self._collapse()
        self.bind(self.host)
        self.device = None

    def expand(self, device: torch.device) -> None:
        """Make the group resident as a copy: weights are decoded once, and the packed ones stay in host memory.

        Raises torch's `OutOfMemoryError`, and nothing has changed.
        """
        buffer = torch.empty(self.copied, dtype=torch.uint8, device=device)
        if self.device is None:
            assert self.host is not None
            self.bind(self.host.to(device))
        if self.host is None:
            self.host = self.device.to("cpu", copy=True)  # type: ignore[union-attr]
        region = Region(buffer)
        for part in self._expandable():
            assert part.decoded is not None
            part.expand(region.take(*part.decoded))
        unpacked = {id(tensor) for tensor in self._unpacked()}
        for tensor, view in self._views(self.host):
            if id(tensor) in unpacked:
                tensor.data = region.take(tuple(tensor.shape), tensor.dtype).copy_(tensor.data)
            else:
                tensor.data = view
        self.device, self.expanded = buffer, True

    def _collapse(self) -> None:
        for part in self._expandable() if self.expanded else ():
            part.expand(None)
        self.expanded = False

    def _expandable(self) -> Iterator[Expandable]:
        parts = (part for module in self.modules for part in module.modules())
        return (part for part in parts if isinstance(part, Expandable))

    def _unpacked(self) -> list[Tensor]:
        packed = {id(tensor) for part in self._expandable() for tensor in part.packing}
        return [tensor for module in self.modules for tensor in _tensors(module) if id(tensor) not in packed]


class CopyStream:
    """Copies to the device on a stream of its own, while products run. On the CPU copies are done at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, streams = device, streams_of(device)
        self._stream = None if streams is None else streams.copy

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy after all that was launched before. Returns a token for `wait`."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, token: torch.cuda.Event | None) -> None:
        """Have what is launched from now on run after the copy of `token`."""
        if token is not None:
            torch.cuda.current_stream(self._device).wait_event(token)


class Prefetcher:
    """Copies streamed groups to the device, each while the group before it runs.

    They take turns in two buffers, each as large as the largest group. Groups run in the given order, for any number of
    rounds. Another order works, too, only without overlap.
    """

    def __init__(self, groups: Sequence[WeightGroup], device: torch.device, copies: CopyStream | None = None) -> None:
        self.groups = list(groups)
        self._copies = copies or CopyStream(device)
        self._buffers: list[Tensor] = []
        self._inside: list[int | None] = [None, None]  # the group in each buffer
        self._copied: list[Any] = [None, None]
        self._left = 0  # rounds to come
        self._brought: int | None = None  # the group that `bring` was asked for last
        self._act: Callable[[Act], None] = lambda act: act()
        self._hooks = [
            hook
            for k, group in enumerate(self.groups)
            for hook in (
                group.modules[0].register_forward_pre_hook(lambda *_, k=k: self._act(partial(self._arrive, k))),
                group.modules[0].register_forward_hook(lambda *_, k=k: self._act(partial(self._leave, k))),
            )
        ]

    @contextmanager
    def open(self, region: Region, rounds: int = 1) -> Iterator[None]:
        """Inside, groups can run, `rounds` times in all, through buffers that are taken from `region`."""
        size = max((group.nbytes for group in self.groups), default=0)
        count = min(2, len(self.groups))
        self._buffers = [region.take((size,), torch.uint8) for _ in range(count)]
        for k, group in enumerate(self.groups):
            group.bind(self._buffers[k % 2])
        self._left, self._brought = rounds, None
        try:
            for k in range(count):
                self._fetch(k)
            yield
        finally:
            for inside, token in zip(self._inside, self._copied, strict=True):
                if inside is not None:
                    self._copies.wait(token)  # before others use the buffer
            for group in self.groups:
                assert group.host is not None
                group.bind(group.host)
            self._buffers, self._inside, self._copied = [], [None, None], [None, None]

    def bring(self, k: int) -> None:
        """Inside `open`: have what is launched from now on find group `k`, whichever ran before, and copy the next."""
        if self._brought == k:
            return
        self._arrive(k)
        following = (k + 1) % len(self.groups)
        if following % 2 != k % 2:
            self._fetch(following)
        self._brought = k

    @contextmanager
    def deferred(self, defer: Callable[[Act], None]) -> Iterator[None]:
        """Inside, copies and waits around groups are not done, but passed to `defer`, in order, to be done later."""
        at_once, self._act = self._act, defer
        try:
            yield
        finally:
            self._act = at_once

    def close(self) -> None:
        """Remove the hooks from the groups' modules."""
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
