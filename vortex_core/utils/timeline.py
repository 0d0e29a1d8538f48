"""Reading something again and again in the background, so that what happens in between is seen."""

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
    """What was read, and when, in seconds of `time.perf_counter`."""

    seconds: float
    reading: T


class Timeline(Generic[T]):
    """Reads something again and again in the background: `moments`, the oldest first.

    From `start` or while `with` lasts, as long as `goes_on` says so. The last `kept` stay. It only observes: a reading
    that fails is left out, and a `goes_on` that fails ends it.
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
        while self._lasts():
            over = self._over.wait(self._interval)
            self._take()
            if over:
                return

    def _lasts(self) -> bool:
        try:
            return self._goes_on()
        except Exception:
            log.debug("Nobody tells whether reading goes on; it ends", exc_info=True)
            return False

    def _take(self) -> None:
        try:
            self.moments.append(Moment(time.perf_counter(), self._read()))
        except Exception:
            log.debug("A reading failed", exc_info=True)
