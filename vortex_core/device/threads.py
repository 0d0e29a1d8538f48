"""How many threads torch computes with on the CPU.

OpenMP's threads wait for each other by spinning, hundreds of times a picture. Where products are as small as the
bundled model's, and other programs want the cores, each wait may last as long as a thread is not scheduled: pictures
then take several times as long as with one thread. The number of threads is one of each thread that computes, so the
device's own can have few, and the rest of the process keeps what it has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

SMALL = 1024  # a model less wide than this gains nothing by a second thread

T = TypeVar("T")


def use(width: int) -> None:
    """Have this thread compute with as many threads as suit a model of `width`: one, or those of the process."""
    if width < SMALL and torch.get_num_threads() == 1:
        return
    # a thread that is new has the process' number, whatever was chosen here before
    process = _elsewhere(torch.get_num_threads)
    count = 1 if width < SMALL else process
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)  # of this thread, and of those that are new
        _elsewhere(lambda: torch.set_num_threads(process))  # which shall have what they had


def _elsewhere(call: Callable[[], T]) -> T:
    """What `call` returns in a thread of its own."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), name="vortex-threads")
    thread.start()
    thread.join()
    return found[0]
