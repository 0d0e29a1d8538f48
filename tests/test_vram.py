"""The VRAM instruments."""

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vortex_core import clear_cuda_cache
from vortex_core.device import vram
from vortex_core.device.vram import (
    Counters,
    Holder,
    Ledger,
    Sampler,
    Snapshot,
    available,
    cap_process,
    counters,
    graph_memory,
    hand_back,
    peak,
    shortage,
    snapshot,
)

GB = 10**9
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Allocator:
    """torch's counters of a device, flat and as its allocator gives them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values = dict.fromkeys(
            (f"{kind}_bytes.all.{what}" for kind in ("allocated", "reserved") for what in ("current", "peak", "freed")),
            0,
        )
        monkeypatch.setattr(vram.torch.cuda, "memory_stats", lambda device: dict(self.values))
        monkeypatch.setattr(vram.torch.cuda, "memory_stats_as_nested_dict", lambda device: self.nested())
        monkeypatch.setattr(vram.torch.cuda, "mem_get_info", lambda device: (60, 100))

    def nested(self) -> dict[str, dict[str, dict[str, int]]]:
        found: dict[str, dict[str, dict[str, int]]] = {}
        for key, value in self.values.items():
            counter, pool, what = key.split(".")
            found.setdefault(counter, {}).setdefault(pool, {})[what] = value
        return found

    def change(self, by: int, kind: str = "reserved") -> None:
        self.values[f"{kind}_bytes.all.current"] += by
        now = self.values[f"{kind}_bytes.all.current"]
        self.values[f"{kind}_bytes.all.peak"] = max(now, self.values[f"{kind}_bytes.all.peak"])
        self.values[f"{kind}_bytes.all.freed"] += max(0, -by)


def test_the_cpu_has_no_vram() -> None:
    assert snapshot(CPU) == Snapshot(allocated=0, reserved=0, process=None, free=0, total=0)
    assert available(CPU) is None
    assert counters(CPU) == Counters(allocated=0, reserved=0)
    with peak(CPU) as found:
        pass
    assert (found.reserved, found.exact) == (0, False)


def test_scoped_peaks_nest_and_reset_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(vram.torch.cuda, "reset_peak_memory_stats", lambda *a: pytest.fail("reset somebody's peak"))
    allocator.change(50)
    with peak(CUDA) as outer:
        allocator.change(20)
        with peak(CUDA) as inner:
            allocator.change(5)
            allocator.change(-25)
        allocator.change(10)
    assert (inner.reserved, inner.exact) == (75, True)
    assert (outer.reserved, outer.exact) == (75, True)
    with peak(CUDA) as later:  # below the old peak, and nothing is freed: the end is the peak
        allocator.change(3)
    assert (later.reserved, later.exact) == (63, True)
    with peak(CUDA) as hidden:  # below the old peak, and freed again: it cannot be told exactly
        allocator.change(3)
        allocator.change(-3)
    assert (hidden.reserved, hidden.exact) == (63, False)


def test_a_peak_counts_what_the_driver_keeps_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(vram, "graph_memory", lambda device: 8)
    with peak(CUDA) as found:
        allocator.change(5)
        allocator.change(4, "allocated")
    assert (found.reserved, found.allocated, found.exact) == (5 + 8, 4, True)


def test_a_backend_that_does_not_count_what_goes_tells_no_exact_peak_below_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """cudaMallocAsync's leaves torch's sums of what came and went at 0."""
    allocator = Allocator(monkeypatch)
    allocator.change(50)
    allocator.change(-50)
    for kind in ("reserved", "allocated"):
        allocator.values |= {f"{kind}_bytes.all.allocated": 0, f"{kind}_bytes.all.freed": 0}
    with peak(CUDA) as found:
        allocator.change(20)
    assert (found.reserved, found.exact) == (20, False)
    with peak(CUDA) as found:
        allocator.change(60)
        allocator.change(30, "allocated")
    assert (found.reserved, found.exact) == (80, True)


def test_a_scope_that_fails_still_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, found = Allocator(monkeypatch), []

    def fail() -> None:
        with peak(CUDA) as scope:
            found.append(scope)
            allocator.change(9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert found[0].reserved == 9


def test_what_is_kept_for_graphs_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps it: natively it is in what torch has reserved."""
    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(vram.torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    allocator.change(30)
    allocator.change(25, "allocated")
    before = available(CUDA)
    monkeypatch.setattr(vram, "graph_memory", lambda device: 4)
    assert available(CUDA) == before + 4


def test_available_counts_what_could_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    allocator.change(30)
    allocator.change(25, "allocated")
    monkeypatch.setattr(vram.torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    assert available(CUDA) == 60 + 30 - 25
    assert available(CUDA, own=10) == 60 + 30 - 15
    monkeypatch.setattr(vram.torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5, raising=False)
    assert available(CUDA, own=10) == 50 - 15


class Shared(Allocator):
    """A card of 100 GB of which 60 are free and torch has reserved 30, 20 of them for tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, share: float = 1.0, name: str = "NVIDIA H200") -> None:
        super().__init__(monkeypatch)
        self.holders: list[Holder] = []
        monkeypatch.setattr(vram.torch.cuda, "mem_get_info", lambda device: (60 * GB, 100 * GB))
        monkeypatch.setattr(vram.torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(vram.torch.cuda, "get_per_process_memory_fraction", lambda device: share, raising=False)
        monkeypatch.setattr(vram, "holders", lambda device: self.holders)
        self.change(30 * GB)
        self.change(20 * GB, "allocated")


def test_nothing_is_short_where_all_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Shared(monkeypatch)
    card.holders = [Holder(os.getpid(), 30 * GB), Holder(1, None), Holder(2, 0)]  # of whom it is not told
    assert shortage(CUDA, own=20 * GB) == ""
    assert shortage(CUDA, own=20 * GB - GB // 10) == ""  # a picture or two
    assert shortage(CPU) == ""


def test_a_cap_on_the_process_is_named_where_it_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    Shared(monkeypatch, share=0.5)
    assert available(CUDA, own=20 * GB) == 50 * GB
    assert shortage(CUDA, own=20 * GB) == (
        "this process is capped at 50.00 GB (torch.cuda.set_per_process_memory_fraction), whatever the card has free"
    )
    Shared(monkeypatch, share=0.95)  # others leave less than that
    assert available(CUDA, own=20 * GB) == 90 * GB
    assert shortage(CUDA, own=20 * GB) == ""


def test_a_torch_that_knows_no_cap_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Shared(monkeypatch, share=0.1)
    monkeypatch.delattr(vram.torch.cuda, "get_per_process_memory_fraction")
    assert available(CUDA, own=20 * GB) == 90 * GB
    assert shortage(CUDA, own=20 * GB) == ""


def test_a_slice_of_a_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Shared(monkeypatch, name="NVIDIA H200 MIG 1g.18gb")
    assert shortage(CUDA, own=20 * GB) == "NVIDIA H200 MIG 1g.18gb is a slice of a card, of 100.00 GB"


def test_other_programs_and_models_are_named_beside_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Shared(monkeypatch, share=0.5)
    card.holders = [Holder(os.getpid(), 31 * GB), Holder(4711, 7 * GB), Holder(4712, GB // 2), Holder(1, None)]
    assert shortage(CUDA, own=5 * GB).split("; ")[1:] == [
        "process 4711 holds 7.00 GB",
        "process 4712 holds 0.50 GB",
        "other models and tensors of this process hold 15.00 GB",
    ]
    assert shortage(CUDA).endswith("other models and tensors of this process hold 20.00 GB")


class Driver:
    """The driver's library, as far as it is called: 8 MB are kept for graphs on its second device."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.trimmed = code, list[int]()

    def cuDeviceGet(self, handle: Any, ordinal: int) -> int:
        handle._obj.value = 40 + ordinal
        return self.code

    def cuDeviceGetGraphMemAttribute(self, handle: Any, attribute: int, found: Any) -> int:
        assert isinstance(found._obj, ctypes.c_uint64)
        found._obj.value = {(41, 2): 8_000_000}.get((handle.value, attribute), 0)
        return 0

    def cuDeviceGraphMemTrim(self, handle: Any) -> int:
        self.trimmed.append(handle.value)
        return 0


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Where torch was asked to empty its cache."""
    inside: list[object] = []
    found: list[object] = []

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        inside.append(where)
        yield
        inside.pop()

    monkeypatch.setattr(vram.torch.cuda, "device", device)
    monkeypatch.setattr(vram.torch.cuda, "empty_cache", lambda: found.extend(inside))
    return found


def test_the_driver_tells_and_gives_back_what_graphs_keep(
    monkeypatch: pytest.MonkeyPatch, emptied: list[object]
) -> None:
    driver, second = Driver(), torch.device("cuda", 1)
    monkeypatch.setattr(vram, "driver_library", lambda: driver)
    assert [graph_memory(where) for where in (second, CUDA, torch.device("cuda"), CPU)] == [8_000_000, 0, 0, 0]
    hand_back(second)
    assert (emptied, driver.trimmed) == ([second], [41])
    hand_back(CPU)
    assert (emptied, driver.trimmed) == ([second], [41])


@pytest.mark.parametrize(
    "library", [None, Driver(code=100), SimpleNamespace(), SimpleNamespace(cuDeviceGet=Driver().cuDeviceGet)]
)
def test_without_a_driver_that_tells_torchs_cache_is_emptied_all_the_same(
    monkeypatch: pytest.MonkeyPatch, emptied: list[object], library: object
) -> None:
    """No driver, a device that it does not know, a driver without the function: none is an error."""
    monkeypatch.setattr(vram, "driver_library", lambda: library)
    assert graph_memory(torch.device("cuda", 1)) == 0
    hand_back(CUDA)
    assert emptied == [CUDA]
    if isinstance(library, Driver):
        assert library.trimmed == []


@pytest.mark.parametrize(("system", "name"), [("nt", "nvcuda.dll"), ("posix", "libcuda.so.1")])
def test_the_drivers_library_is_looked_for_once(monkeypatch: pytest.MonkeyPatch, system: str, name: str) -> None:
    found = object()
    load, asked = vram.driver_library.__wrapped__, list[str]()

    def missing(library: str) -> None:
        raise OSError(f"{library}: cannot open shared object file")

    monkeypatch.setattr(vram, "os", SimpleNamespace(name=system))
    monkeypatch.setattr(vram.ctypes, "CDLL", lambda library: asked.append(library) or found)
    assert load() is found
    assert asked == [name]
    monkeypatch.setattr(vram.ctypes, "CDLL", missing)
    assert load() is None


def test_the_counters_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    allocator.change(30)
    allocator.change(25, "allocated")
    allocator.change(-5, "allocated")
    assert counters(CUDA) == Counters(allocated=20, reserved=30)
    assert snapshot(CUDA, process=False) == Snapshot(allocated=20, reserved=30, process=None, free=60, total=100)
    monkeypatch.setattr(vram.torch.cuda, "memory_stats_as_nested_dict", lambda device: {})  # CUDA was not used yet
    assert counters(CUDA) == Counters(allocated=0, reserved=0)


def test_capping_sets_torchs_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    Allocator(monkeypatch)
    told: list[float] = []
    monkeypatch.setattr(vram.torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    for limit in (25, 300, None):
        cap_process(CUDA, limit)
    assert told == [0.25, 1.0, 1.0]


SIZES = st.integers(0, 10**11)


@given(st.dictionaries(st.text(min_size=1), SIZES, max_size=6), SIZES, SIZES, SIZES)
def test_a_ledger_adds_up(components: dict[str, int], others: int, graphs: int, cached: int) -> None:
    allocated = sum(components.values()) + others
    for outside in (0, graphs):  # torch's own allocator has what graphs keep, or the driver
        reserved = allocated + graphs + cached - outside
        ledger = Ledger(components, allocated, reserved, graphs, outside, {})
        assert (ledger.others, ledger.cached) == (others, cached)
        if not {"graphs", "others", "cached"} & set(components):
            assert sum(ledger.rows.values()) == ledger.held == reserved + outside


def test_the_sampler_sees_what_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.setattr(vram, "process_memory", lambda device: None)
    seen = threading.Event()

    def look(device: torch.device) -> Snapshot:
        found = snapshot(device)
        if found.reserved == 7:
            seen.set()
        return found

    monkeypatch.setattr(vram, "snapshot", look)
    with Sampler(CUDA, interval=0.001) as sampler:
        allocator.change(7)
        assert seen.wait(10)
        allocator.change(-7)
    assert sampler.most("reserved") == 7
    assert sampler.most("process") is None
    assert sampler.samples[-1].reserved == 0
    assert not any(thread.name == "vortex-vram-sampler" for thread in threading.enumerate())


def test_nvml_tells_who_is_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    class Missing(Exception):
        pass

    running = [SimpleNamespace(pid=1, usedGpuMemory=None), SimpleNamespace(pid=os.getpid(), usedGpuMemory=5)]
    monkeypatch.setattr(pynvml, "NVMLError", Missing)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: running)
    monkeypatch.setattr(vram.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    assert vram.holders(CUDA) == [Holder(1, None), Holder(os.getpid(), 5)]
    assert vram.process_memory(CUDA) == 5

    def missing(*arguments: object) -> None:
        raise Missing

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", missing)
    assert vram.holders(CUDA) == []
    assert vram.process_memory(CUDA) is None
    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert vram.holders(CUDA) == []


def test_clear_cuda_cache_logs_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    freed = clear_cuda_cache()
    assert "clear_cuda_cache" in caplog.text
    assert freed >= 0


@pytest.mark.gpu
def test_the_counters_see_an_allocation() -> None:
    before = snapshot(CUDA)
    with peak(CUDA) as found:
        held = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    after = snapshot(CUDA)
    assert after.allocated == torch.cuda.memory_allocated(CUDA)
    assert after.reserved == torch.cuda.memory_reserved(CUDA)
    assert after.allocated - before.allocated == 2**30
    assert after.reserved - before.reserved >= 2**30
    assert after.free <= after.total - after.reserved  # less where others use the card, too
    assert found.reserved >= after.reserved
    if before.process is not None and after.process is not None:
        assert after.process - before.process >= 2**30
    del held
    assert clear_cuda_cache() >= 2**30
    assert snapshot(CUDA).reserved <= before.reserved
