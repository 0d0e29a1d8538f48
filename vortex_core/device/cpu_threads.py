"""How many threads torch computes with on the CPU.

OpenMP's threads wait for each other by spinning, hundreds of times a picture. The bundled model's products are small.
When other programs use the cores, each wait may last until a thread is scheduled again, and a picture takes several
times as long as with one thread. torch keeps this number for each thread, so the worker's can be small, and the rest
of the process keeps its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

SMALL = 1024  # a narrower model gains nothing by a second thread

T = TypeVar("T")


def use(width: int) -> None:
    """Have this thread compute with one thread for a model of small `width`, else with as many as the process has."""
    if width < SMALL and torch.get_num_threads() == 1:
        return
    # a new thread has the process' number, whatever was chosen for this one
    process = _elsewhere(torch.get_num_threads)
    count = 1 if width < SMALL else process
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)  # this sets it for new threads, too
        _elsewhere(lambda: torch.set_num_threads(process))  # and this sets theirs back


def _elsewhere(call: Callable[[], T]) -> T:
    """The result of `call` in a new thread."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), name="vortex-threads")
    thread.start()
    thread.join()
    return found[0]
