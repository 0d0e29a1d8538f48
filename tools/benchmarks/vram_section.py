"""What the sections of vram_contract.py share. Each section runs in a process of its own."""

from __future__ import annotations

import json
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from vortex_core import Engine
from vortex_core.device.vram import graph_memory, process_memory
from vortex_core.memory.planner import MemoryPlan
from vortex_core.utils.timing import Stopwatch

GB = 1e9
PROMPT = "a red circle on a white background"
CONTEXT = int(0.6 * GB)  # about what a CUDA context takes, where NVML does not tell
MARK = "CONTRACT "  # before a row that a section's process prints


class Section:
    """The state of a section's process: its device and sizes. It writes the rows."""

    def __init__(self, model: str, device: str, cache: str | None) -> None:
        self.model, self.device, self.cache = model, torch.device(device), cache
        self.cuda = self.device.type == "cuda"
        self.context = self.total = 0
        if self.cuda:
            self.device = torch.device("cuda", self.device.index or 0)
            self.total = torch.cuda.mem_get_info(self.device)[1]
            self.context = process_memory(self.device) or CONTEXT

    def size(self, side: int) -> int:
        """The side to draw: on the CPU an eighth of `side`, so that a rehearsal is short."""
        return side if self.cuda else max(64, side // 8)

    def gb(self, budget: float) -> float:
        """The budget to use: on the CPU a fifteenth, for the miniature."""
        return budget if self.cuda else budget / 15

    def cap(self, size: float) -> None:
        """Limit torch's allocator to `size` bytes, as on a smaller card."""
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(min(1.0, size / self.total), self.device)

    def load(self, budget: float | None, **options: Any) -> Any:
        return Engine.load(self.model, device=self.device, vram_budget=budget, cache_dir=self.cache, **options)

    def reserved(self) -> int:
        """Bytes that torch has reserved, and that the driver holds for graphs."""
        return torch.cuda.memory_reserved(self.device) + graph_memory(self.device) if self.cuda else 0

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def peak(self, counter: str = "reserved") -> int:
        """The most since `reset`. For graphs the driver's bytes of now count: they stay as long as the graphs."""
        if not self.cuda:
            return 0
        graphs = graph_memory(self.device) if counter == "reserved" else 0
        return getattr(torch.cuda, f"max_memory_{counter}")(self.device) + graphs

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def draw(self, engine: Any, side: int, batch: int = 1, prompt: Any = PROMPT, **options: Any) -> Any:
        side = self.size(side)
        return engine.generate(prompt, seed=1, height=side, width=side, batch_size=batch, **options)

    def ms(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Median milliseconds, after one run to warm up."""
        times = []
        for _ in range(repeats + 1):
            with Stopwatch(self.device) as watch:
                work()
            times.append(watch.seconds * 1e3)
        return statistics.median(times[1:])

    def step_ms(self, engine: Any, side: int, pictures: int = 3) -> float:
        """Median milliseconds from one step's end to the next one's."""
        stamps: list[float] = []

        def stamp(*step: Any) -> None:
            if self.cuda:
                torch.cuda.synchronize(self.device)
            stamps.append(time.perf_counter())

        for _ in range(pictures):
            self.draw(engine, side, on_step=stamp)
        ends = range(3, len(stamps), 4)  # the time between two pictures is no step
        steps = [later - earlier for i, (earlier, later) in enumerate(pairwise(stamps)) if i not in ends]
        return statistics.median(steps) * 1e3

    def row(self, promise: str, found: Any, holds: bool | None, **figures: Any) -> None:
        """Print whether a promise holds; None if this device cannot tell."""
        holds = None if holds is None or not self.cuda else bool(holds)
        row = {"promise": promise, "found": str(found), "holds": holds, **figures}
        print(MARK + json.dumps(row), flush=True)

    def predicted(self, what: str, plan: MemoryPlan, **figures: Any) -> float:
        """Print whether the peak since `reset` is 0 to 3% below the plan's. Returns that share."""
        measured = max(1, self.peak())
        off = plan.peak / measured - 1
        self.row(
            f"{what}: predicted 0 to 3% above",
            f"{plan.peak / GB:.3f} against {measured / GB:.3f} GB, {off:+.2%}; slices of {plan.slice}, "
            f"strips of {plan.requirements.rows}, {len(plan.streamed)} groups stream",
            0 <= off <= 0.03,
            size=f"{plan.requirements.width} x {plan.requirements.height}",
            batch=plan.requirements.batch,
            predicted=plan.peak,
            reserved=measured,
            hosted=plan.hosted,
            **figures,
        )
        return off

    @contextmanager
    def part(self, name: str) -> Iterator[str]:
        """A named part of a section. An error in it is a broken promise, and the next part runs."""
        started = time.perf_counter()
        try:
            yield name
        except Exception as error:
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"[:400]
            print(MARK + json.dumps({"promise": name, "found": found, "holds": False}), flush=True)
        print(f"  {name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def host_memory() -> dict[str, float]:
    """This process' resident memory in GB: now, at its peak, and its share of file mappings and shared memory."""
    status = Path("/proc/self/status").read_text()
    found = {
        key: re.search(rf"{key}:\s+(\d+) kB", status)
        for key in ("VmRSS", "VmHWM", "RssFile", "RssShmem", "VmPin", "VmLck")
    }
    return {key: int(match[1]) * 1024 / GB for key, match in found.items() if match}


class HostPeak:
    """Samples the peaks of resident memory, and of its anonymous part (no file, no shared mapping), in a block."""

    def __enter__(self) -> HostPeak:
        self.anonymous = self.resident = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            now = host_memory()
            resident = now.get("VmRSS", 0)
            self.resident = max(self.resident, resident)
            self.anonymous = max(self.anonymous, resident - now.get("RssFile", 0) - now.get("RssShmem", 0))

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def copy_rate(s: Section) -> float:
    """Bytes a second from pinned host memory to the device."""
    if not hasattr(s, "rate"):
        source = torch.empty(2**27, dtype=torch.uint8, pin_memory=s.cuda)
        target = torch.empty(2**27, dtype=torch.uint8, device=s.device)
        s.rate = 2**27 / s.ms(lambda: target.copy_(source, non_blocking=True)) * 1e3
    return s.rate
