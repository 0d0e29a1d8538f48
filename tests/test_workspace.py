"""The block that calls work in, against a stand-in for torch's private pools; on a GPU: tools/vram_contract.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from vortex_core import workspace
from vortex_core.vram import Counters
from vortex_core.workspace import Workspace

MB = 10**6


class Driver:
    """Says which pool an allocation comes from, and refuses beyond `room` bytes."""

    def __init__(self) -> None:
        self.routes: list[object] = []
        self.taken: list[tuple[object, int]] = []  # pool and bytes of each allocation
        self.reserved: dict[int, int] = {}  # by pool
        self.room = 100 * MB
        self.cached = 0
        self.emptied = 0

    def empty(self, size: int, *, dtype: torch.dtype, device: object) -> object:
        pool = self.routes[-1] if self.routes else None
        have = self.reserved.get(id(pool), 0)
        if size > have:
            if sum(self.reserved.values()) - have + self.cached + size > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.reserved[id(pool)] = size
        self.taken.append((pool, size))
        return SimpleNamespace(size=size)

    @contextmanager
    def use_mem_pool(self, pool: object, device: object) -> Iterator[None]:
        assert pool not in self.routes
        self.routes.append(pool)
        try:
            yield
        finally:
            assert self.routes.pop() is pool

    def empty_cache(self) -> None:
        self.cached = 0
        self.emptied += 1

    def MemPool(self) -> object:
        self.reserved.clear()
        return SimpleNamespace()

    def counters(self, device: object) -> Counters:
        return Counters(0, sum(self.reserved.values()))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(workspace.torch, "empty", made.empty)
    for name in ("use_mem_pool", "empty_cache", "MemPool"):
        monkeypatch.setattr(workspace.torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(workspace, "counters", made.counters)
    monkeypatch.setattr(workspace.torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(workspace.torch.cuda, "device", lambda device: contextmanager(lambda: (yield))())
    return made


def make(size: int = 50 * MB) -> Workspace:
    space = Workspace(torch.device("cuda", 0))
    space.reserve(size)
    return space


def test_calls_work_in_the_block_and_hand_out_from_outside(driver: Driver) -> None:
    space = make()
    assert (space.nbytes, space.epoch) == (50 * MB, 1)
    pool = driver.taken[0][0]
    assert pool is not None
    with space.use():
        driver.empty(MB, dtype=torch.uint8, device=None)
        with space.outside():
            driver.empty(2 * MB, dtype=torch.uint8, device=None)
        driver.empty(3 * MB, dtype=torch.uint8, device=None)
    driver.empty(4 * MB, dtype=torch.uint8, device=None)
    assert [(inside is pool, size // MB) for inside, size in driver.taken] == [
        (True, 50), (True, 1), (False, 2), (True, 3), (True, 50), (False, 4),
    ]  # fmt: skip


def test_it_grows_but_never_shrinks_by_itself(driver: Driver) -> None:
    space = make()
    space.reserve(20 * MB)
    assert (space.nbytes, space.epoch) == (50 * MB, 1)
    space.reserve(60 * MB)
    assert (space.nbytes, space.epoch) == (60 * MB, 2)
    space.release()
    assert space.nbytes == 0


def test_an_error_gives_the_block_back(driver: Driver) -> None:
    space = make()
    with pytest.raises(KeyboardInterrupt), space.use():
        raise KeyboardInterrupt
    assert space.nbytes == 0
    assert driver.routes == []
    with space.use():
        driver.empty(MB, dtype=torch.uint8, device=None)
    assert driver.taken[-1] == (None, MB)
    space.reserve(50 * MB)
    assert space.nbytes == 50 * MB


def test_an_error_of_the_callers_passes_through_outside(driver: Driver) -> None:
    space = make()
    with pytest.raises(KeyboardInterrupt), space.use(), space.outside():
        raise KeyboardInterrupt
    assert driver.routes == []
    assert space.nbytes == 0


def test_what_stays_behind_in_the_block_ends_it(driver: Driver) -> None:
    space = make()
    with space.use():
        driver.reserved[id(driver.taken[0][0])] = 10 * MB  # 40 of 50 are still held by somebody
    assert space.nbytes == 0


def test_cached_memory_is_given_back_before_it_fails(driver: Driver) -> None:
    driver.cached = 80 * MB
    space = make()
    assert (space.nbytes, driver.cached) == (50 * MB, 0)
    with pytest.raises(torch.OutOfMemoryError):
        space.reserve(200 * MB)
    assert space.nbytes == 0
    assert driver.routes == []


def test_other_allocators_work_as_usual(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    space = make()
    with space.use(), space.outside():
        pass
    assert (space.nbytes, driver.taken) == (0, [])
