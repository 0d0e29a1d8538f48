"""The counters of memory that the VRAM profile and the leak check read, by the names that reports show."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..latency import synchronize
from ..vram import snapshot

ALLOCATED, RESERVED, PROCESS, HOST = "torch allocated", "torch reserved", "process (NVML)", "host (RSS)"
INTERVAL = 0.02  # seconds between two readings of a timeline

T = TypeVar("T")
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
class Moment(Generic[T]):
    """What was read, and when, in seconds of `time.perf_counter`."""

    seconds: float
    reading: T


class Timeline(Generic[T]):
    """Reads something again and again in the background: `moments`, the oldest first.

    From `start` or while `with` lasts, as long as `goes_on` says so. The last `kept` stay.
    """

    def __init__(
        self,
        read: Callable[[], T],
        *,
        interval: float = INTERVAL,
        kept: int | None = None,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.moments: deque[Moment[T]] = deque(maxlen=kept)
        self._read, self._interval, self._goes_on = read, interval, goes_on
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it reads now."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Read from now on, where it does not yet."""
        if not self.running:
            self._over.clear()
            self._thread = threading.Thread(target=self._run, name="vortex-timeline", daemon=True)
            self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended by itself."""
        if self._thread is not None:
            self._thread.join(timeout)

    def __enter__(self) -> Timeline[T]:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()

    def _run(self) -> None:
        self._take()
        while self._goes_on():
            over = self._over.wait(self._interval)
            self._take()
            if over:
                return

    def _take(self) -> None:
        self.moments.append(Moment(time.perf_counter(), self._read()))
