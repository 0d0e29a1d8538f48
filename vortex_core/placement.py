"""Where an engine's weights are at the moment, and how they move."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from .host_memory import HostMemory
from .planner import ALWAYS, BLOCKS, PROMPT
from .residency import Stager, Unit
from .vram import hand_back

log = logging.getLogger(__name__)


class Placement:
    """Units on a device.

    `prompt` and `steps` bring the units that stream, at prompt time and at step time. `streamed` names them; None
    while all is offloaded.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        self.units = list(units)
        self.device = device
        self.streamed: frozenset[str] | None = None
        self.addresses: tuple[int, ...] = ()  # where units lie on the device; 0 for those that stream
        self.prompt = self.steps = Stager([], device)
        self._host: list[HostMemory] = []

    @property
    def resident_bytes(self) -> dict[str, int]:
        """Bytes on the device by group."""
        groups = dict.fromkeys((BLOCKS, *ALWAYS, *PROMPT), 0)
        for unit in self.units:
            groups[unit.group] += unit.nbytes if unit.device is not None else 0
        return groups

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is pinned."""
        return sum(memory.pinned for memory in self._host)

    def host_memory(self, size: int) -> HostMemory:
        """Memory for units that stream, pinned if they stream to a GPU."""
        memory = HostMemory(size, pin=self.device.type == "cuda")
        self._host.append(memory)
        return memory

    def place(self, streamed: frozenset[str]) -> None:
        """Have exactly `streamed` stream. Raises torch's `OutOfMemoryError`, with some units still to arrive."""
        if streamed == self.streamed:
            return
        leaving = [unit for unit in self.units if unit.name in streamed and unit.device is not None]
        arriving = [unit for unit in self.units if unit.name not in streamed and unit.device is None]
        self._stop()
        if leaving or arriving:
            sizes = (sum(unit.nbytes for unit in units) / 1e9 for units in (leaving, arriving))
            log.info("Moving weights: %.2f GB to host memory, %.2f GB to %s", *sizes, self.device)
        streaming = [unit for unit in self.units if unit.name in streamed]
        new = sum(unit.nbytes for unit in streaming if not unit.streams)
        memory = self.host_memory(new) if new else None
        for unit in streaming:
            unit.to_host(memory)
        if leaving:
            hand_back(self.device)
        for unit in arriving:
            unit.to_device(self.device)
        self.start(streamed)

    def start(self, streamed: frozenset[str]) -> None:
        """Units are where `streamed` says: have those of them stream."""
        units = [unit for unit in self.units if unit.name in streamed]
        self.prompt = Stager([unit for unit in units if unit.group in PROMPT], self.device)
        self.steps = Stager([unit for unit in units if unit.group == BLOCKS], self.device)
        self.streamed = streamed
        self.addresses = tuple(0 if unit.device is None else unit.device.data_ptr() for unit in self.units)

    def offload(self) -> None:
        """Move everything to host memory, for `place` to bring back; the device's stays in torch's cache."""
        self._stop()
        for unit in self.units:
            if unit.device is not None:
                unit.to_host()

    def _stop(self) -> None:
        self.prompt.close()
        self.steps.close()
        self.streamed = None
