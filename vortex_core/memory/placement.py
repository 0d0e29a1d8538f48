"""Where an engine's weights are at the moment, and how they move."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ..device.vram import hand_back
from .host_memory import HostMemory
from .offload import Prefetcher, WeightGroup
from .planner import ALWAYS, BLOCKS, PROMPT

log = logging.getLogger(__name__)


class Placement:
    """Units on a device.

    `prompt` and `steps` bring the groups that stream, at prompt time and at step time. `streamed` names them; None
    while all is offloaded.
    """

    def __init__(self, groups: Sequence[WeightGroup], device: torch.device) -> None:
        self.groups = list(groups)
        self.device = device
        self.streamed: frozenset[str] | None = None
        self.addresses: tuple[int, ...] = ()  # where groups lie on the device; 0 for those that stream
        self.prompt = self.steps = Prefetcher([], device)
        self._host: list[HostMemory] = []

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device by part."""
        parts = dict.fromkeys((BLOCKS, *ALWAYS, *PROMPT), 0)
        for group in self.groups:
            parts[group.part] += group.nbytes if group.device is not None else 0
        return parts

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is pinned."""
        return sum(memory.pinned for memory in self._host)

    def host_memory(self, size: int) -> HostMemory:
        """Memory for groups that stream, pinned if they stream to a GPU."""
        memory = HostMemory(size, pin=self.device.type == "cuda")
        self._host.append(memory)
        return memory

    def place(self, streamed: frozenset[str]) -> None:
        """Have exactly `streamed` stream. Raises torch's `OutOfMemoryError`, with some groups still to arrive."""
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
        """Units are where `streamed` says: have those of them stream."""
        groups = [group for group in self.groups if group.name in streamed]
        self.prompt = Prefetcher([group for group in groups if group.part in PROMPT], self.device)
        self.steps = Prefetcher([group for group in groups if group.part == BLOCKS], self.device)
        self.streamed = streamed
        self.addresses = tuple(0 if group.device is None else group.device.data_ptr() for group in self.groups)

    def offload(self) -> None:
        """Move everything to host memory, for `place` to bring back; the device's stays in torch's cache."""
        self._stop()
        for group in self.groups:
            if group.device is not None:
                group.to_host()

    def _stop(self) -> None:
        self.prompt.close()
        self.steps.close()
        self.streamed = None
