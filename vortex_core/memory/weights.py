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

    `streamed` names the groups that stream; it is None while all are offloaded. `prompt` and `steps` prefetch them, at
    prompt time and at step time.
    """

    def __init__(self, groups: Sequence[WeightGroup], device: torch.device) -> None:
        self.groups = list(groups)
        self.device = device
        self.streamed: frozenset[str] | None = None
        self.addresses: tuple[int, ...] = ()  # of groups on the device; 0 for those that stream
        self.prompt = self.steps = Prefetcher([], device)
        self._host: list[HostMemory] = []

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device by part."""
        return by_part((group.part, group.nbytes) for group in self.groups if group.device is not None)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned."""
        return sum(memory.pinned for memory in self._host)

    def host_memory(self, size: int) -> HostMemory:
        """Memory for groups that stream, pinned for a GPU."""
        memory = HostMemory(size, pin=self.device.type == "cuda")
        self._host.append(memory)
        return memory

    def place(self, streamed: frozenset[str]) -> None:
        """Have exactly `streamed` stream. On torch's `OutOfMemoryError` some groups are not on the device yet."""
        if streamed == self.streamed:
            return
        leaving = [group for group in self.groups if group.name in streamed and group.device is not None]
        arriving = [group for group in self.groups if group.name not in streamed and group.device is None]
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
        self.start(streamed)

    def start(self, streamed: frozenset[str]) -> None:
        """Prefetch `streamed` from now on. Groups must already lie where that wants them."""
        groups = [group for group in self.groups if group.name in streamed]
        self.prompt = Prefetcher([group for group in groups if group.part in PROMPT], self.device)
        self.steps = Prefetcher([group for group in groups if group.part == BLOCKS], self.device)
        self.streamed = streamed
        self.addresses = tuple(0 if group.device is None else group.device.data_ptr() for group in self.groups)

    def offload(self) -> None:
        """Move all groups to host memory, until `place` brings them back. The freed memory stays in torch's cache."""
        self._stop()
        for group in self.groups:
            if group.device is not None:
                group.to_host()

    def _stop(self) -> None:
        self.prompt.close()
        self.steps.close()
        self.streamed = None
