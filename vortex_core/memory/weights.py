"""Where an engine's weights are now, and how they move."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..device.vram import hand_back
from .host_memory import HostMemory
from .offload import Prefetcher, WeightGroup
from .planner import BLOCKS, PROMPT, by_part

log = logging.getLogger(__name__)


class Placement:
    """The weight groups of an engine, on its device or in host memory.

    `streamed` names the groups that stream; it is None while all are offloaded. `copies` names those that are resident
    as copies in 8 bits. `prompt` and `steps` prefetch what streams, at prompt time and at step time.
    """

    def __init__(self, groups: Sequence[WeightGroup], device: torch.device) -> None:
        self.groups = list(groups)
        self.device = device
        self.streamed: frozenset[str] | None = None
        self.copies: frozenset[str] = frozenset()
        self.addresses: tuple[int, ...] = ()  # of groups on the device; 0 for those that stream
        self.prompt = self.steps = Prefetcher([], device)
        self._host: list[HostMemory] = []

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device by part."""
        return by_part((group.part, group.held) for group in self.groups if group.device is not None)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned."""
        return sum(memory.pinned for memory in self._host)

    def host_memory(self, size: int) -> HostMemory:
        """Memory for groups that stream, pinned for a GPU."""
        memory = HostMemory(size, pin=self.device.type == "cuda")
        self._host.append(memory)
        return memory

    def place(self, streamed: frozenset[str], copies: frozenset[str] = frozenset()) -> None:
        """Have exactly `streamed` stream, and `copies` be resident as copies.

        On torch's `OutOfMemoryError` some groups are not on the device yet.
        """
        if (streamed, copies) == (self.streamed, self.copies):
            return
        leaving = [group for group in self.groups if group.name in streamed and group.device is not None]
        packed = [group for group in self.groups if group.name not in streamed | copies]
        arriving = [group for group in packed if group.device is None or group.expanded]
        expanding = [group for group in self.groups if group.name in copies and not group.expanded]
        self._stop()
        if leaving or arriving:
            sizes = (sum(group.nbytes for group in groups) / 1e9 for groups in (leaving, arriving))
            log.info("Moving weights: %.2f GB to host memory, %.2f GB to %s", *sizes, self.device)
        streaming = [group for group in self.groups if group.name in streamed]
        new = sum(group.nbytes for group in streaming if not group.streams)
        memory = self.host_memory(new) if new else None
        for group in streaming:
            group.to_host(memory)
        if leaving:
            hand_back(self.device)
        for group in arriving:
            group.to_device(self.device)
        if expanding:
            log.info("Decoding %d blocks to 8 bits, once for all steps", len(expanding))
        for group in expanding:
            group.expand(self.device)
            hand_back(self.device)  # its packed weights: together they would not fit
        self.start(streamed, copies)

    def start(self, streamed: frozenset[str], copies: frozenset[str] = frozenset()) -> None:
        """Prefetch `streamed` from now on. Groups must already lie where that wants them."""
        groups = [group for group in self.groups if group.name in streamed]
        self.prompt = Prefetcher([group for group in groups if group.part in PROMPT], self.device)
        self.steps = Prefetcher([group for group in groups if group.part == BLOCKS], self.device)
        self.streamed, self.copies = streamed, copies
        self.addresses = self._addresses()

    def relayout(self, groups: Sequence[WeightGroup]) -> None:
        """Lay `groups` out anew, after their modules got other tensors. Raises torch's `OutOfMemoryError`."""
        streaming = [group for group in groups if group.device is None and group.streams]
        memory = self.host_memory(sum(group.measure() for group in streaming)) if streaming else None
        for group in groups:
            group.relayout(memory)
            hand_back(self.device)  # what it had: together they would not fit
        self.addresses = self._addresses()
        self.prune()

    def prune(self) -> None:
        """Give back the host memory that no group lies in any more."""
        used = {group.host.untyped_storage().data_ptr() for group in self.groups if group.host is not None}
        self._host = [memory for memory in self._host if memory.address in used]

    def _addresses(self) -> tuple[int, ...]:
        return tuple(0 if group.device is None else group.device.data_ptr() for group in self.groups)

    def offload(self) -> None:
        """Move all groups to host memory, until `place` brings them back. The freed memory stays in torch's cache."""
        self._stop()
        for group in self.groups:
            if group.device is not None:
                group.to_host()

    def _stop(self) -> None:
        self.prompt.close()
        self.steps.close()
        self.streamed, self.copies = None, frozenset()
