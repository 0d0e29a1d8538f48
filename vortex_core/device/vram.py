"""How a device's memory is used: torch's two counters, the process as NVML sees it, the whole device.

`allocated` is what tensors take, `reserved` what torch's allocator keeps for them, `process` that plus the CUDA
context and libraries. What captured steps allocate is in `reserved` with torch's own allocator; with cudaMallocAsync
the driver keeps it (`graph_memory`). All in bytes; GB is 10^9.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..errors import GB
from ..utils.timeline import INTERVAL, Timeline
from .nvml import ask_card

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Bytes at one moment. `process` is None where NVML does not know it (no driver, another PID namespace)."""

    allocated: int
    reserved: int
    process: int | None
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class Counters:
    """torch's two counters of a device, in bytes."""

    allocated: int
    reserved: int


def counters(device: torch.device) -> Counters:
    """The counters of a CUDA device now; zeros on the CPU, and before CUDA was used."""
    stats = torch.cuda.memory_stats_as_nested_dict(device) if device.type == "cuda" else None
    if not stats:
        return Counters(allocated=0, reserved=0)
    # nested: `memory_stats` flattens and sorts it all, which takes 0.4 ms
    return Counters(stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"])


def snapshot(device: torch.device, *, process: bool = True) -> Snapshot:
    """A device's memory now; zeros on the CPU. NVML, which takes a millisecond, is asked only if `process`."""
    if device.type != "cuda":
        return Snapshot(allocated=0, reserved=0, process=None, free=0, total=0)
    free, total = torch.cuda.mem_get_info(device)
    now = counters(device)
    own = process_memory(device) if process else None
    return Snapshot(now.allocated, now.reserved, process=own, free=free, total=total)


def process_memory(device: torch.device) -> int | None:
    """Bytes that NVML counts for this process on a CUDA device, or None where it does not know."""
    return next((holder.nbytes for holder in holders(device) if holder.pid == os.getpid()), None)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with memory on a device. `nbytes` is None where the driver does not tell it."""

    pid: int
    nbytes: int | None


def holders(device: torch.device) -> list[Holder]:
    """The processes that NVML sees on a CUDA device; none where it does not answer."""
    return ask_card(device, _holders) or []


def _holders(pynvml: Any, card: Any) -> list[Holder]:
    return [
        Holder(int(process.pid), _told(process.usedGpuMemory))
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    ]


def _told(used: Any) -> int | None:
    """Bytes, or None where NVML does not know them; some modules then give the largest 64-bit number."""
    return None if used is None or int(used) >= 2**63 else int(used)


def available(device: torch.device, own: int = 0) -> int | None:
    """Bytes that torch could reserve for an engine that holds `own` of the allocated bytes; None on the CPU.

    That is what the driver has free, what torch and graphs keep unused, and `own`; less where the process is capped.
    """
    if device.type != "cuda":
        return None
    now = snapshot(device, process=False)
    return min(now.free + now.reserved + graph_memory(device), _cap(device, now.total)) - (now.allocated - own)


def shortage(device: torch.device, own: int = 0) -> str:
    """What limits `available`, in words: a cap on the process, a slice of a card, other programs and models."""
    if device.type != "cuda":
        return ""
    now, words = snapshot(device, process=False), []
    cap = _cap(device, now.total)
    if cap < now.free + now.reserved:
        words.append(
            f"this process is capped at {cap / GB:.2f} GB (torch.cuda.set_per_process_memory_fraction), whatever the "
            "card has free"
        )
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:
        words.append(f"{name} is a slice of a card, of {now.total / GB:.2f} GB")
    others = [holder for holder in holders(device) if holder.pid != os.getpid() and holder.nbytes]
    words += [f"process {holder.pid} holds {(holder.nbytes or 0) / GB:.2f} GB" for holder in others]
    if now.allocated - own > 0.1 * GB:
        words.append(f"other models and tensors of this process hold {(now.allocated - own) / GB:.2f} GB")
    return "; ".join(words)


def _cap(device: torch.device, total: int) -> int:
    """Bytes that torch may reserve in this process."""
    fraction: Callable[[torch.device], float] = getattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0
    )
    return int(fraction(device) * total)


def hand_back(device: torch.device) -> None:
    """Return to the driver what torch has cached, and what deleted graphs have left, on a CUDA device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
        _driver("cuDeviceGraphMemTrim", device)


def graph_memory(device: torch.device) -> int:
    """Bytes that the driver keeps for graphs that allocate inside, beside what torch has reserved."""
    if device.type != "cuda":
        return 0
    found = ctypes.c_uint64(0)
    reserved = 2  # CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT
    _driver("cuDeviceGetGraphMemAttribute", device, reserved, ctypes.byref(found))
    return found.value


def _driver(name: str, device: torch.device, *arguments: Any) -> None:
    """Call the driver where torch has no function for it. That only observes and tidies, so a failure is no error."""
    library = driver_library()
    if library is None:
        return
    handle = ctypes.c_int(0)
    try:
        if library.cuDeviceGet(ctypes.byref(handle), device.index or 0) == 0:
            getattr(library, name)(handle, *arguments)
    except Exception as error:  # an old driver, or another library of that name
        log.debug("%s: %s", name, error)


@cache
def driver_library() -> Any:
    """The CUDA driver's library, or None where it does not load."""
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        log.debug("The CUDA driver's library does not load: %s", error)
        return None


def cap_process(device: torch.device, nbytes: int | None) -> None:
    """Have torch refuse to reserve more than `nbytes` in the whole process, not for Vortex alone; None: no cap."""
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else min(1.0, nbytes / total), device)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the reserved bytes of a device are used for; `rows` add up to `held`.

    `components` are Vortex'. `graphs` is memory of captured graphs, which no tensor has: part of `reserved`, or, with
    cudaMallocAsync, of the driver's memory (`outside`). `others` is allocated besides: pictures and tensors of callers,
    other models. `cached` is reserved and unused, with the rounding of segments. `pinned` is pinned host memory by use,
    and no part of the sum.
    """

    components: Mapping[str, int]
    allocated: int
    reserved: int
    graphs: int
    outside: int
    pinned: Mapping[str, int]

    @property
    def held(self) -> int:
        """What torch has reserved, and the driver keeps for graphs."""
        return self.reserved + self.outside

    @property
    def others(self) -> int:
        """Allocated by other code than Vortex."""
        return self.allocated - sum(self.components.values())

    @property
    def cached(self) -> int:
        """Reserved and unused."""
        return self.held - self.allocated - self.graphs

    @property
    def rows(self) -> dict[str, int]:
        """Every component, then `graphs`, `others` and `cached`."""
        return {**self.components, "graphs": self.graphs, "others": self.others, "cached": self.cached}


@dataclass(slots=True)
class Peak:
    """The most that torch had within a scope, in bytes. Where `exact` is False, it may have been more."""

    allocated: int = 0
    reserved: int = 0
    exact: bool = False


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """The peak of what runs inside, filled in at the end. Scopes nest, and torch's statistics are not reset.

    torch keeps one peak a process, which others read and reset. Where it rises inside, it is this scope's. Else an
    earlier peak was higher; then, if nothing was freed inside, memory only grew, and its last value is the peak. So the
    peak of `reserved` is known unless memory went back to the driver inside; only that of `allocated` may be missed.
    """
    found = Peak()
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.memory_stats(device)
    try:
        yield found
    finally:
        after = torch.cuda.memory_stats(device)
        found.reserved, sure = _peak(before, after, "reserved_bytes")
        found.reserved += graph_memory(device)
        found.allocated, exact = _peak(before, after, "allocated_bytes")
        found.exact = sure and exact


def _peak(before: Mapping[str, int], after: Mapping[str, int], counter: str) -> tuple[int, bool]:
    first, last, most = (f"{counter}.all.{what}" for what in ("current", "freed", "peak"))
    if after[most] > before[most]:
        return after[most], True
    counts = after.get(f"{counter}.all.allocated", 1) > 0  # cudaMallocAsync's backend does not count what is freed
    if counts and after[last] == before[last]:  # nothing was freed, so it only grew
        return after[first], True
    return max(before[first], after[first]), False


class Sampler(Timeline[Snapshot]):
    """A `Timeline` of snapshots. Spikes shorter than its interval are missed; `peak` sees those of torch."""

    def __init__(self, device: torch.device, interval: float = INTERVAL) -> None:
        super().__init__(partial(snapshot, device), interval=interval)

    @property
    def samples(self) -> list[Snapshot]:
        """The snapshots, oldest first."""
        return [moment.reading for moment in self.moments]

    def most(self, counter: str) -> int | None:
        """The largest value of a `Snapshot` field; None where it was never known."""
        return max((value for s in self.samples if (value := getattr(s, counter)) is not None), default=None)


def clear_cuda_cache() -> int:
    """Return torch's unused cached memory to the driver; the bytes freed. The last resort, not a habit.

    It makes the next picture slower, so Vortex never calls it between pictures: the next allocation of each size asks
    the driver again, which takes milliseconds and a device synchronization.
    """
    if not torch.cuda.is_available():
        log.info("clear_cuda_cache: there is no CUDA device, nothing to free")
        return 0
    gc.collect()
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    freed = before - torch.cuda.memory_reserved()
    log.warning("clear_cuda_cache freed %.2f GB; the next picture pays for allocating it again", freed / 1e9)
    return freed
