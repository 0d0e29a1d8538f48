"""How many threads compute: few for a small model, and nobody else's number changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from vortex_core import Engine
from vortex_core.device import cpu_threads


@pytest.fixture
def four() -> Iterator[None]:
    """A process that computes with four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_new_thread(*widths: int) -> list[int]:
    """What torch computes with in one new thread, after each choice."""
    found: list[int] = []

    def choose() -> None:
        for width in widths:
            cpu_threads.use(width)
            found.append(torch.get_num_threads())

    thread = threading.Thread(target=choose)
    thread.start()
    thread.join()
    return found


def test_a_small_model_has_one_thread_and_others_keep_theirs(four: None) -> None:
    assert in_new_thread(256, 256, 3072, 256) == [1, 1, 4, 1]
    assert torch.get_num_threads() == 4
    assert cpu_threads._elsewhere(torch.get_num_threads) == 4  # what a thread starts with from now on


def test_a_large_model_has_what_the_process_has_now(four: None) -> None:
    assert in_new_thread(3072) == [4]
    torch.set_num_threads(2)
    assert in_new_thread(256, 3072) == [1, 2]


def test_the_miniature_computes_on_one_thread(engine: Engine, four: None) -> None:
    assert engine._run(lambda memory: torch.get_num_threads()) == 1
    assert torch.get_num_threads() == 4
