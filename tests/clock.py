"""A clock that stands still until a test moves it: what is measured is what the test says, on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest


class Clock:
    """Stands for `time.perf_counter`. Each reading takes `tick` seconds, and nothing else takes any."""

    def __init__(self, tick: float = 0.0) -> None:
        self.tick, self.seconds, self.readings = tick, 0.0, 0

    def __call__(self) -> float:
        self.readings += 1
        self.seconds += self.tick
        return self.seconds

    def taking(self, seconds: float, call: Callable[..., Any], more: dict[int, float] | None = None) -> Any:
        """`call`, which takes so many seconds; for the n-th time, from 0, `more[n]` on top."""
        numbers = count()

        def timed(*arguments: Any, **options: Any) -> Any:
            self.seconds += seconds + (more or {}).get(next(numbers), 0.0)
            return call(*arguments, **options)

        return timed


@contextmanager
def told_time(tick: float = 0.0) -> Iterator[tuple[Clock, pytest.MonkeyPatch]]:
    """The clock in place of the process's, and a patch to say with what takes how long."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(tick)
        patch.setattr(time, "perf_counter", clock)
        yield clock, patch
