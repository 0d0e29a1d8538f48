"""A worker for tests, what occupies it, and whether it lets go of what it was given."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vortex_core.device.jobs import check
from vortex_core.device.worker import Worker

CPU = torch.device("cpu")
TIMES = 200


class Thing:
    """Something to hold, or not."""


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.0005)


class Tracked:
    """Makes calls whose arguments and results must be gone when the call is over."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Any]] = []

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        argument = Thing()
        self.seen.append(weakref.ref(argument))

        def call() -> Any:
            assert argument
            result = Thing()
            self.seen.append(weakref.ref(result))
            function()
            return result

        self.seen.append(weakref.ref(call))
        return call

    def gone(self) -> bool:
        return all(ref() is None for ref in self.seen)


@contextlib.contextmanager
def occupied(worker: Worker, owner: object = None) -> Iterator[None]:
    """The worker is busy meanwhile."""
    running, gate = threading.Event(), threading.Event()

    def job() -> None:
        running.set()
        assert gate.wait(30)

    thread = threading.Thread(target=worker.run, args=(job,), kwargs={"owner": owner})
    thread.start()
    assert running.wait(30)
    try:
        yield
    finally:
        gate.set()
        thread.join(30)


def steps(n: int = 10**9, seconds: float = 0.0002) -> None:
    """A picture, as far as the worker is concerned."""
    for _ in range(n):
        check()
        time.sleep(seconds)
