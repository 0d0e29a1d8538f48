"""Reads a value again and again in a background thread, so that short changes are seen."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

INTERVAL = 0.02  # seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Moment(Generic[T]):
    """A reading, and its time in seconds of `time.perf_counter`."""

    seconds: float
    reading: T


class Timeline(Generic[T]):
    """Calls `read` every `interval` seconds in the background. `moments` are the last `kept` readings, oldest first.

    It runs from `start`, or inside `with`, while `goes_on` returns True. It only observes: a reading that fails is left
    out, and a `goes_on` that fails ends it.
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
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if not self.running:
            self._over.clear()
            self._thread = threading.Thread(target=self._run, name="vortex-timeline", daemon=True)
            self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended by itself."""
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
        while self._lasts():
            over = self._over.wait(self._interval)
            self._take()
            if over:
                return

    def _lasts(self) -> bool:
        try:
            return self._goes_on()
        except Exception:
            log.debug("`goes_on` failed; reading ends", exc_info=True)
            return False

    def _take(self) -> None:
        try:
            self.moments.append(Moment(time.perf_counter(), self._read()))
        except Exception:
            log.debug("A reading failed", exc_info=True)
