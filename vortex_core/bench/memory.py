"""The counters of memory that the VRAM profile and the leak check read, by the names that reports show."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch

from ..latency import synchronize
from ..vram import snapshot

ALLOCATED, RESERVED, PROCESS, HOST = "torch allocated", "torch reserved", "process (NVML)", "host (RSS)"
INTERVAL = 0.02  # seconds between two readings of a timeline

Counters = dict[str, int | None]  # bytes by name; None where NVML does not tell


def counters(device: torch.device) -> Counters:
    """Bytes at this moment. On the CPU only the host's."""
    import psutil

    found: Counters = {}
    if device.type == "cuda":
        now = snapshot(device)
        found = {ALLOCATED: now.allocated, RESERVED: now.reserved, PROCESS: now.process}
    return {**found, HOST: int(psutil.Process().memory_info().rss)}


def at_rest(device: torch.device) -> Counters:
    """`counters` once the device has done all it was given."""
    synchronize(device)
    return counters(device)


@dataclass(frozen=True, slots=True)
class Moment:
    """`counters`, `seconds` after the timeline began."""

    seconds: float
    counters: Counters


class Timeline:
    """Reads the counters in the background while `with` lasts: `readings`, the oldest first, the last at its end."""

    def __init__(self, device: torch.device) -> None:
        self.readings: list[Moment] = []
        self._device = device
        self._begun = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vortex-memory", daemon=True)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._begun

    def __enter__(self) -> Timeline:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(INTERVAL)
            self.readings.append(Moment(self.seconds, counters(self._device)))
