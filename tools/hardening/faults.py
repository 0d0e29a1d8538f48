"""Injects faults at every stage, and checks the outcome, the next picture and that nothing stays behind.

    python tools/hardening/faults.py                          # each fault 3 times, at places from --seed; minutes
    python tools/hardening/faults.py --times 20 --table faults.md     # the table of docs/faults.md
    python tools/hardening/faults.py --only step --only cache         # stages whose names start so
    python tools/hardening/faults.py --device cuda --model FOLDER  # processes and files still: the miniature, CPU

A trap is set in the code of one stage and springs at one of its tensor operations: an exception, memory that runs out,
Ctrl-C, or a kill of the process. Files are cut, replaced and rewritten while they are read, disks are full, entries of
the cache are damaged. After each fault the next picture must be right bit for bit, memory must be free again, and no
temporary file may be left. A trap that never springs counts as broken, because it proves nothing. Ends with one JSON
line; exits with 1 if a fault lost or changed a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import file_faults
import torch
from torch import Tensor
from traps import ACTS, Injected, Trap, no_room, raises, trapped

import vortex_core
from vortex_core import Engine, VortexError
from vortex_core.checkpoint import cache

TINY = Path(vortex_core.__file__).parent / "assets" / "tiny-schnell"
DRAW: dict[str, Any] = {"prompt": "a red circle on a white background", "seed": 7, "steps": 2}
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
ALLOWED: dict[str, tuple[type[BaseException], ...]] = {  # errors that are allowed in place of a right picture
    "exception": (Injected,),
    "Ctrl-C": (KeyboardInterrupt,),
    "CUDA error": (RuntimeError, VortexError),
}


@dataclass
class Row:
    """One fault at one stage."""

    stage: str
    fault: str
    injected: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        what = "; ".join(f"{words}{f' ({n})' if len(self.happened) > 1 else ''}" for words, n in self.happened.items())
        after = "; ".join(dict.fromkeys(self.wrong)) or "right, memory back, no file left"
        return [self.stage, self.fault, str(self.injected), what, after]


class Bench:
    """An engine whose weights stream, one that gets no faults, and folders in which nothing may stay."""

    def __init__(self, folder: Path, model: str | Path, device: str, size: int, times: int, seed: int) -> None:
        self.model, self.device, self.times, self.random = model, device, times, random.Random(seed)
        self.draw = DRAW | {"height": size, "width": size}
        self.cache, self.out = folder / "cache", folder / "out"
        self.out.mkdir()
        self.rows: list[Row] = []
        self.witness = self.load()
        self.expected = self.witness.generate(**self.draw)
        self.budget = self._tight()
        self.engine = self.load(vram_budget=self.budget)
        self.engine.generate(**self.draw)

    def _tight(self) -> float:
        """A budget at which weights stream and pictures of this size can be drawn."""
        budget = 0.2
        while budget < 40:
            with contextlib.suppress(VortexError), self.load(vram_budget=budget) as engine:
                engine.generate(**self.draw)
                if engine.plan.streamed:
                    return budget
            budget *= 1.02
        raise SystemExit("No budget makes the weights of this model stream.")

    def load(self, model: str | Path | None = None, **options: Any) -> Engine:
        """An engine. With a `cache_dir` it keeps what it reads there, however small; without one it keeps nothing."""
        smallest = 0 if "cache_dir" in options else 2**60
        with patched(cache, "SMALLEST", smallest):
            return Engine.load(self.model if model is None else model, device=self.device, **options)

    def held(self) -> int:
        """Bytes of live tensors that were made since `gc.freeze`; on a card the bytes that torch has there."""
        gc.collect()
        if self.device.startswith("cuda"):
            return torch.cuda.memory_allocated(self.device)
        tensors = (thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter))
        storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def leftovers(self) -> list[str]:
        """Files left behind: anything in the temporary folder, parts of files in cache and output."""
        parts = [*self.cache.glob("**/*.part"), *self.cache.glob("**/*.tmp"), *self.out.glob(".*")]
        others = Path(tempfile.gettempdir()).iterdir()  # torch keeps a folder of its own there
        return [path.name for path in (*parts, *others) if not path.name.startswith("torchinductor_")]

    def run(self, stage: str, fault: str, once: Callable[[Row], None], times: int | None = None) -> None:
        """Run a row: `once` injects the fault, and notes the outcome in `row.happened` and errors in `row.wrong`."""
        row = Row(stage, fault)
        self.rows.append(row)
        before = 0
        for i in range(self.times if times is None else times):
            once(row)
            if i == 0:  # what stays after the first time stays on purpose
                before = self.held()
        if (grown := self.held() - before) > 2**20:
            row.wrong.append(f"{grown / 2**20:.1f} MiB more are held")
        if not row.injected:
            row.wrong.append("NOT INJECTED")
        row.wrong += [f"left {name}" for name in self.leftovers()]
        for folder in (self.cache, self.out):
            shutil.rmtree(folder, ignore_errors=True)
        self.out.mkdir()
        print(f"{'BROKEN' if row.wrong else 'holds '} " + " | ".join(row.cells()), flush=True)

    def attempt(self, row: Row, work: Callable[[], Tensor | None], expected: Tensor, *allowed: type) -> None:
        """Note the outcome of `work`: the right picture, or one of the `allowed` errors."""
        try:
            picture = work()
        except BaseException as error:
            row.happened[type(error).__name__] += 1
            if not isinstance(error, allowed):
                row.wrong.append(f"{type(error).__name__}: {str(error)[:100]}")
            return
        right = picture is None or torch.equal(picture, expected)
        row.happened["done, right" if right else "WRONG PICTURE"] += 1
        if not right:
            row.wrong.append("a wrong picture without a word")

    def then(self, row: Row, work: Callable[[], Tensor], expected: Tensor | None = None) -> None:
        """Check that the picture after a fault is right."""
        try:
            if not torch.equal(work(), self.expected if expected is None else expected):
                row.wrong.append("the next picture is wrong")
        except BaseException as error:
            row.wrong.append(f"the next picture: {type(error).__name__}: {str(error)[:100]}")

    def drawn(self, **options: Any) -> Tensor:
        """The picture of a newly loaded engine."""
        with self.load(**options) as engine:
            return engine.generate(**self.draw)


def drawing(bench: Bench, stage: str, fault: str) -> None:
    """A fault while a picture is drawn, anywhere in its stage."""
    with Trap(stage, float("inf"), lambda: None) as whole:
        bench.engine.generate(**bench.draw | {"prompt": "a prompt of its own, which must be encoded"})
    numbers = iter(range(10**6))

    def once(row: Row) -> None:
        draw, expected = bench.draw, bench.expected
        if stage in ("encode", "stream copy"):  # a new prompt, for which the engine must stream T5
            draw = draw | {"prompt": f"{stage}, {fault}, {next(numbers)}"}
            expected = bench.witness.generate(**draw)
        for at in (bench.random.randint(1, max(1, whole.calls)), 1):  # after a tighter plan there may be fewer
            with Trap(stage, at, ACTS[fault], stays=fault.endswith("end")) as trap:
                allowed = ALLOWED.get(fault, (VortexError,))
                bench.attempt(row, lambda: bench.engine.generate(**draw), expected, *allowed)
            row.injected += trap.sprung
            if trap.sprung:
                break
        if fault == "CUDA error":
            try:
                bench.engine.generate(**draw)
                row.wrong.append("the engine goes on after it")
            except VortexError:
                bench.engine.unload()
            bench.witness.unload()  # the device is lost for every engine
            bench.witness, bench.engine = bench.load(), bench.load(vram_budget=bench.budget)
        bench.then(row, lambda: bench.engine.generate(**draw), expected)
        bench.then(row, lambda: bench.engine.generate(**bench.draw))

    bench.run(stage, fault, once)


def loading(bench: Bench, stage: str, fault: str) -> None:
    """A fault while a part is read, or an entry of the cache is written."""

    def once(row: Row) -> None:
        options: dict[str, Any] = {}
        if stage == "cache write":
            shutil.rmtree(bench.cache, ignore_errors=True)
            options = {"cache_dir": bench.cache}
        trap = Trap(stage, bench.random.randint(1, 6), ACTS.get(fault, raises(no_room)))
        with trap, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cache that cannot be written gives a warning
            allowed = ALLOWED.get(fault, (VortexError,))
            bench.attempt(row, lambda: bench.drawn(**options), bench.expected, *allowed)
        row.injected += trap.sprung
        bench.then(row, lambda: bench.drawn(**options))
        bench.then(row, lambda: bench.engine.generate(**bench.draw))

    bench.run(stage, fault, once)


def logging_fails(bench: Bench) -> None:
    """A foreign log handler that raises at one of the records."""

    class Broken(logging.Handler):
        left = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.left -= 1
            if self.left == 0:
                raise Injected("no log")

    def once(row: Row) -> None:
        handler, log = Broken(), logging.getLogger("vortex_core")
        handler.left, level = bench.random.randint(1, 5), log.level
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        try:
            bench.attempt(row, bench.drawn, bench.expected, Injected)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
        row.injected += handler.left <= 0
        bench.then(row, bench.drawn)
        bench.then(row, lambda: bench.engine.generate(**bench.draw))

    bench.run("log", "exception", once)


def plot_fails(bench: Bench, fault: str) -> None:
    """The VRAM Monitor's plot cannot be drawn: the value is passed on all the same."""
    import matplotlib.backends.backend_agg as agg

    sys.path += [str(Path(__file__).parents[2] / place) for place in ("tests", "tools/comfyui")]
    from fake_host import FakeHost, node

    error = {"exception": Injected, "out of memory": MemoryError}[fault]
    calls = []

    def draw(canvas: object) -> None:
        calls.append(canvas)
        raise error("no plot")  # a new error each time: its traceback keeps its frames alive

    def once(row: Row) -> None:
        host = FakeHost(bench.out)
        before = {name: sys.modules.get(name) for name in host.modules()}
        sys.modules |= host.modules()
        try:
            with patched(agg.FigureCanvasAgg, "draw", draw):
                bench.attempt(
                    row, lambda: node("VortexVRAMMonitor").monitor(bench.expected, 0.0, 0.0, True)[0], bench.expected
                )
        finally:
            for name, module in before.items():
                sys.modules.pop(name) if module is None else sys.modules.update({name: module})
        row.injected += bool(calls)
        calls.clear()
        bench.then(row, lambda: bench.engine.generate(**bench.draw))

    bench.run("plot", fault, once)


@contextlib.contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def inside(bench: Bench, wanted: Callable[[str], bool]) -> None:
    """Every row whose fault this process survives."""
    draws = [(stage, fault) for stage in ("encode", "stream copy", "step", "decode") for fault in ACTS]
    loads = [(f"load {part}", fault) for part in PARTS for fault in [*list(ACTS)[:2], "Ctrl-C"]]
    loads += [("cache write", fault) for fault in ("exception", "out of memory", "Ctrl-C", "disk full")]
    for stage, fault in draws:
        if wanted(stage):
            drawing(bench, stage, fault)
    for stage, fault in loads:
        if wanted(stage):
            loading(bench, stage, fault)
    for stage, row in (
        *(("plot", partial(plot_fails, bench, fault)) for fault in ("exception", "out of memory")),
        ("log", partial(logging_fails, bench)),
    ):
        if wanted(stage):
            row()


def run(model: str | Path, device: str, size: int, times: int, seed: int, only: list[str]) -> list[Row]:
    """All rows of the stages whose names start with one of `only`; without `only`, of all."""

    def wanted(stage: str) -> bool:
        return not only or stage.startswith(tuple(only))

    with tempfile.TemporaryDirectory(prefix="vortex-faults-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        with patched(tempfile, "tempdir", str(folder / "tmp")), trapped():
            bench = Bench(folder, model, device, size, times, seed)
            gc.freeze()  # objects that exist now are not counted
            try:
                inside(bench, wanted)
                rows = bench.rows
                if device != "cpu":
                    bench = Bench(folder / "processes", TINY, "cpu", 64, times, seed)
                    file_faults.all_of(bench, folder, wanted)
                    return rows + bench.rows
                file_faults.all_of(bench, folder, wanted)
                return rows
            finally:
                gc.unfreeze()
                bench.engine.unload()
                bench.witness.unload()


PAGE = """# Faults, and what comes after them

Written by `python tools/hardening/faults.py --times {times} --table docs/faults.md`, on a CPU with the miniature. Each
fault is injected at places drawn at random in its stage. After each, the next picture is compared bit for bit with that
of an undisturbed engine, memory is counted, and folders are searched for temporary files.

{table}"""


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = ("Stage", "Fault", "Injected", "What happened", "After it")
    lines = [head, ("---",) * 5, *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="a folder in the diffusers layout (default: the miniature)")
    parser.add_argument("--device", default="cpu", help="'cpu' or 'cuda'")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--times", type=int, default=3, help="how often each fault is injected, at random places")
    parser.add_argument("--seed", type=int, default=0, help="seed of those places: the same seed repeats a run")
    parser.add_argument("--only", action="append", default=[], help="stages whose names start so; may be repeated")
    parser.add_argument("--table", type=Path, help="Markdown to write")
    given = parser.parse_args()
    started = time.perf_counter()
    rows = run(given.model, given.device, given.size, given.times, given.seed, given.only)
    if given.table is not None:
        given.table.write_text(PAGE.format(times=given.times, table=table(rows)))
    figures = {
        "faults": len(rows),
        "injected": sum(row.injected for row in rows),
        "wrong_pictures": sum(row.happened["WRONG PICTURE"] for row in rows),
        "broken": [f"{row.stage}: {row.fault}: {'; '.join(dict.fromkeys(row.wrong))}" for row in rows if row.wrong],
        "seconds": round(time.perf_counter() - started, 1),
        "seed": given.seed,
    }
    print(json.dumps(figures | {"holds": not figures["broken"]}))
    return int(bool(figures["broken"]))


if __name__ == "__main__":
    sys.exit(main())
