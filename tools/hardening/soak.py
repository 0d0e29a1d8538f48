"""Makes thousands of mixed calls. Some of them are cancelled, late, interrupted or out of memory.

    python tools/hardening/soak.py --pictures 2000            # the miniature on the CPU: about half an hour on one core
    python tools/hardening/soak.py --pictures 300 --device cuda --model FOLDER --largest 1024
    python tools/hardening/soak.py --pictures 200 --threads 8 --seed 5

Each call (prompt, size, batch, steps, how it ends) follows from `--seed` and its number, whichever thread makes it.
After each round of `--every` calls nothing runs: the last picture is compared, bit for bit, with that of a newly loaded
engine, and memory, threads and files are counted. Fails if a picture is wrong, a call ends in another way than it
should, or anything grows from the first tenth to the end. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from traps import ACTS, Injected, Trap, trapped

from vortex_core import DeadlineError, Engine, MemoryPressureError

WORDS = ("red", "green", "blue", "yellow", "circle", "square", "ring", "star", "on", "above", "beside", "a", "white")
ENDS = {  # how a call ends: how many of 20 do so, and the errors allowed in place of a picture
    "done": (10, ()),
    "refused": (2, (Injected,)),
    "Ctrl-C": (1, (KeyboardInterrupt,)),
    "late": (2, (DeadlineError,)),
    "cancelled": (2, (asyncio.CancelledError,)),
    "out of memory": (2, (MemoryPressureError,)),
    "out of memory, to the end": (1, (MemoryPressureError,)),
}  # fmt: skip
STAGES = (("encode", 60), ("step", 80), ("decode", 60))  # where memory runs out, and at one of how many operations
MB = 1e6


@dataclass(frozen=True)
class Call:
    """One call of `generate`. It ends with `end` of `ENDS`, at the step or the share of the way in `moment`."""

    number: int
    end: str
    moment: float
    options: dict[str, Any]

    @classmethod
    def of(cls, seed: int, number: int, largest: int, sound: bool) -> Call:
        """Call `number` of a run; with `sound` one that ends in a picture."""
        dice = random.Random(f"{seed} {number}")
        sides = range(64, largest + 1, 16)
        end = dice.choices(list(ENDS), [share for share, _ in ENDS.values()])[0]
        prompt = " ".join(dice.choices(WORDS, k=dice.randint(1, 12)))
        options = {
            "prompt": prompt if dice.random() < 0.8 else "a red circle on a white background",
            "seed": dice.randrange(2**32),
            "height": dice.choice(sides),
            "width": dice.choice(sides),
            "steps": dice.randint(1, 4),
            "batch_size": dice.choice((1, 1, 1, 2, 3)),
        }
        return cls(number, "done" if sound else end, dice.random(), options)


def make(engine: Engine, call: Call) -> Tensor:
    """Make a call, and let it end as planned."""
    last = 1 + int(call.moment * call.options["steps"])

    def on_step(i: int, n: int, clean: Tensor) -> None:
        if i != last:
            return
        if call.end == "late":
            time.sleep(0.3)
        else:
            raise KeyboardInterrupt if call.end == "Ctrl-C" else Injected

    if call.end in ("refused", "Ctrl-C"):
        return engine.generate(**call.options, on_step=on_step)
    if call.end == "late":  # the deadline passes while the call waits, or after a step
        return engine.generate(**call.options, on_step=on_step, deadline=0.01 + 0.2 * call.moment)
    if call.end == "cancelled":
        return asyncio.run(cancelled(engine, call))
    if call.end.startswith("out of memory"):
        stage, most = STAGES[call.number % 3]
        with Trap(stage, 1 + int(call.moment * most), ACTS["out of memory"], stays=call.end.endswith("end")):
            return engine.generate(**call.options)
    return engine.generate(**call.options, on_step=(lambda *step: None) if call.moment < 0.3 else None)


async def cancelled(engine: Engine, call: Call) -> Tensor:
    """Cancel the call at a step, or while it waits for its turn."""
    loop = asyncio.get_running_loop()
    last = int(call.moment * (call.options["steps"] + 1))

    def on_step(i: int, n: int, clean: Tensor) -> None:
        if i == last:
            loop.call_soon_threadsafe(task.cancel)
            time.sleep(0.05)  # so that the cancel arrives before the picture is done

    task = asyncio.create_task(engine.agenerate(**call.options, on_step=on_step))
    if last == 0:
        await asyncio.sleep(0)
        task.cancel()
    return await task


class Soak:
    """The run: the engine, the outcomes of calls, and the counts between the rounds."""

    def __init__(self, load: Callable[[], Engine], largest: int, threads: int, seed: int) -> None:
        self.load, self.largest, self.threads, self.seed = load, largest, threads, seed
        self.engine = load()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.checked = 0
        self.counts: list[dict[str, float]] = []

    def one(self, call: Call) -> Tensor | None:
        """Make a call, and note whether it ended as it should."""
        what = f"call {call.number} ({call.end})"
        allowed = ENDS[call.end][1]
        try:
            picture = make(self.engine, call)
        except BaseException as error:
            self.outcomes[f"{call.end}: {type(error).__name__}"] += 1
            if not isinstance(error, allowed):
                self.wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            return None
        self.outcomes[f"{call.end}: a picture"] += 1
        shape = (*(call.options[name] for name in ("batch_size", "height", "width")), 3)
        if picture.shape != shape or not bool(((picture >= 0) & (picture <= 1)).all()):
            self.wrong.append(f"{what}: not a picture: {tuple(picture.shape)}")
        if call.end in ("refused", "Ctrl-C"):
            self.wrong.append(f"{what}: ended in a picture")
        return picture

    def round(self, first: int, count: int) -> None:
        """Make `count` calls from all threads, and check the last one."""
        calls = [Call.of(self.seed, first + i, self.largest, i == count - 1) for i in range(count)]
        with ThreadPoolExecutor(self.threads) as pool:
            *_, last = pool.map(self.one, calls)
        if last is not None:
            with self.load() as fresh:
                expected = fresh.generate(**calls[-1].options)
            self.checked += 1
            if not torch.equal(last, expected):
                self.wrong.append(f"call {calls[-1].number}: differs from a fresh engine's")
        del last
        self.count()

    def count(self) -> None:
        """Counts of what this process holds while nothing runs."""
        gc.collect()
        process = psutil.Process()
        cuda = self.engine.device.type == "cuda"
        self.counts.append(
            {
                "rss_mb": process.memory_info().rss / MB,
                "threads": threading.active_count(),
                "files": process.num_fds(),
                "temporary": len(list(Path(tempfile.gettempdir()).iterdir())),
                "reserved_mb": torch.cuda.memory_reserved(self.engine.device) / MB if cuda else 0.0,
            }
        )

    def growth(self) -> dict[str, list[float]]:
        """Each count after the first tenth of the rounds and at the end, as medians over nearby rounds."""
        most = max(1, len(self.counts) // 10)
        return {
            name: [
                round(statistics.median(row[name] for row in rows), 1)
                for rows in (self.counts[most : 2 * most] or self.counts[:1], self.counts[-most:])
            ]
            for name in self.counts[0]
        }


def run(
    load: Callable[[], Engine], pictures: int, every: int, largest: int, threads: int, seed: int, room: float
) -> dict[str, Any]:
    """The figures of a run. `room`: MB that the process may have grown by."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vortex-soak-") as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            with trapped():
                soak = Soak(load, largest, threads, seed)
                for first in range(0, pictures, every):
                    soak.round(first, min(every, pictures - first))
                    print(
                        f"{min(first + every, pictures)}/{pictures}: {time.perf_counter() - started:.0f} s, "
                        f"{soak.counts[-1]['rss_mb']:.0f} MB, {len(soak.wrong)} wrong",
                        flush=True,
                    )
                soak.engine.unload()
        finally:
            tempfile.tempdir = before
    growth = soak.growth()
    limits = {"rss_mb": room, "threads": 0, "files": 0, "temporary": 0, "reserved_mb": 64.0}
    wrong = soak.wrong + [
        f"{name} grew from {first:g} to {last:g}"
        for name, (first, last) in growth.items()
        if last - first > limits[name]
    ]
    for line in wrong:
        print(f"BROKEN {line}")
    return {
        "pictures": pictures,
        "outcomes": dict(sorted(soak.outcomes.items())),
        "checked": soak.checked,
        **growth,
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
        "wrong": len(wrong),
        "broken": wrong[:20],
        "holds": not wrong,
    }


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000, help="calls of generate")
    parser.add_argument("--every", type=int, default=50, help="calls a round; the last one is checked")
    parser.add_argument("--model", default="tiny", help="'tiny', a folder or a file")
    parser.add_argument("--device", default="cpu", help="'cpu' or 'cuda'")
    parser.add_argument("--vram-budget", type=float, help="GB (default: the engine's own)")
    parser.add_argument("--largest", type=int, default=128, help="pixels a side, at most; from 64 on")
    parser.add_argument("--threads", type=int, default=4, help="threads that call at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls: the same seed repeats a run")
    parser.add_argument("--room", type=float, default=64.0, help="MB that the process may grow by")
    given = parser.parse_args()

    def load() -> Engine:
        return Engine.load(given.model, device=given.device, vram_budget=given.vram_budget)

    options = (given.pictures, given.every, given.largest, given.threads, given.seed, given.room)
    figures = run(load, *options)
    print(json.dumps(figures | {"model": given.model, "device": given.device, "cores": os.cpu_count()}))
    return int(not figures["holds"])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
