"""Feeds tens of thousands of hostile inputs of every kind. Each must be read, or refused with an error of ours.

    python tools/hardening/fuzz.py                                    # 50,000 inputs, on as many processes as cores
    python tools/hardening/fuzz.py --inputs 2000 --kind config --kind tokenizer
    python tools/hardening/fuzz.py --again config:317            # that input alone, in this process, with its traceback

Each input is a text, or a sound file that tools/hardening/mutators.py changed. It follows from `--seed` and its number.
Any outcome but a result or a `VortexError` is wrong: another exception, a picture that is not finite, a crash, more
than 5 s of a core's time, more than a minute, more than 1 GB. Wrong inputs are listed, and saved below `--save`. Ends
with one JSON line; exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import logging
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import micro_model
import mutators
import psutil
import torch

sys.path += [str(Path(__file__).parents[2] / place) for place in ("tests", "tools/comfyui")]
import specimens
from typer.testing import CliRunner

from vortex_core import Engine
from vortex_core.checkpoint.quantize import quantize_file
from vortex_core.cli.inspection import inspect
from vortex_core.cli.main import app

SECONDS, GB = 5.0, 10**9  # of a core's time, so that the load of the machine does not matter
MINUTE = 60.0  # on the clock, for inputs that only wait
SHARES = {"safetensors": 8, "gguf": 4, "config": 2, "tokenizer": 2, "index": 2, "png": 2, "workflow": 1}
RECYCLED = 500  # inputs after which a new process starts
DRAW: dict[str, Any] = {"seed": 1, "height": 64, "width": 64, "steps": 1}
WIDGETS: dict[str, Any] = {
    "model": "vortex/micro", "vram_budget": 6.5, "mode": "exact", "prompt": "a red circle", "width": 64, "height": 64,
    "batch_size": 1, "seed": 1, "steps": 1, "negative_prompt": "",
}  # fmt: skip
LOADER = ("model", "vram_budget", "mode")


class Wrong(Exception):
    """The outcome is neither right nor a refusal."""


class Target:
    """Sound files below `folder`, and the use that Vortex makes of an input of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.micro = micro_model.write(folder / "micro")
        specimens.save(specimens.plain(), folder / "plain.safetensors")
        specimens.save(specimens.packed(True), folder / "nested.safetensors")
        values = {name: (tensor.half().numpy(), None) for name, tensor in specimens.plain().items()}
        specimens.write_gguf(folder / "sound.gguf", "flux", values)
        weights = self.micro / "transformer" / "diffusion_pytorch_model.safetensors"
        from safetensors import safe_open

        with safe_open(weights, framework="pt") as file:
            names = list(file.keys())
        self.index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, weights.name)}
        self.host: Any = None

    def data(self, kind: str, dice: random.Random) -> tuple[bytes, str]:
        """An input, and the place where it belongs."""
        if kind in ("png", "workflow"):
            made = mutators.words(dice) if kind == "png" else widgets(dice)
            return (made if isinstance(made, str) else json.dumps(made)).encode("utf-8", "surrogatepass"), ""
        if kind == "index":
            return mutators.KINDS[kind](dice, json.dumps(self.index).encode()), "transformer"
        where = {
            "safetensors": ("plain.safetensors", "nested.safetensors"),
            "gguf": ("sound.gguf",),
            "config": tuple(f"micro/{part}/config.json" for part in micro_model.SIZES),
            "tokenizer": ("micro/tokenizer/tokenizer.json", "micro/tokenizer_2/tokenizer.json"),
        }
        name = dice.choice(where[kind])
        return mutators.KINDS[kind](dice, (self.folder / name).read_bytes()), name

    def feed(self, kind: str, data: bytes, where: str, scratch: Path) -> None:
        """Feed an input to Vortex. Raises its errors, and `Wrong`."""
        if kind in ("safetensors", "gguf"):
            path = scratch / Path(where).name
            path.write_bytes(data)
            inspect(path)
            quantize_file(path, scratch / "out.safetensors", device="cpu")
        elif kind == "png":
            written(self.micro, scratch / "a.png", data.decode("utf-8", "surrogatepass"))
        elif kind == "workflow":
            self.workflow(json.loads(data))
        else:
            model = scratch / "micro"
            shutil.copytree(self.micro, model, copy_function=os.link)
            name = "diffusion_pytorch_model.safetensors.index.json"
            path = model / where / name if kind == "index" else scratch / where
            path.unlink(missing_ok=True)  # else the sound file would change, too
            path.write_bytes(data)
            with Engine.load(model, device="cpu") as engine:
                if not bool(engine.generate("a red circle", **DRAW).isfinite().all()):
                    raise Wrong("a picture that is not finite")

    def workflow(self, values: dict[str, Any]) -> None:
        """Widgets' values into the nodes, in the stand-in for ComfyUI."""
        from fake_host import FakeHost, node

        if self.host is None:
            self.host = FakeHost(self.folder / "host")
            sys.modules.update(self.host.modules())
            place = self.folder / "host" / "models" / "diffusers"
            place.mkdir(parents=True, exist_ok=True)
            if not (place / "micro").exists():  # of the other process: a link out of the folder would be refused
                shutil.copytree(self.micro, place / f"micro-{os.getpid()}")
                with contextlib.suppress(OSError):
                    (place / f"micro-{os.getpid()}").rename(place / "micro")
        handle, *_ = node("VortexFluxLoader").load(*(values[name] for name in LOADER))
        options = {name: value for name, value in values.items() if name not in LOADER}
        images, _ = node("VortexSchnellSampler").sample(handle, **options)
        if not bool(images.isfinite().all()):
            raise Wrong("a picture that is not finite")


def widgets(dice: random.Random) -> dict[str, Any]:
    """Sound values with one or two hostile ones."""
    values = WIDGETS | {"model": "diffusers/micro"}
    for _ in range(dice.choice((1, 1, 2))):
        name = dice.choice(list(values))
        values[name] = mutators.near(dice, values[name]) if dice.random() < 0.5 else mutators.junk(dice)
    return values


def written(model: Path, path: Path, text: str) -> None:
    """Draw a prompt with the command: the PNG must hold the whole prompt, or the command must refuse it."""
    from PIL import Image

    options = ("--model", str(model), "--device", "cpu", "--size", "64x64", "--steps", "1", "--seed", "1")
    result = CliRunner().invoke(app, ["generate", *options, "-o", str(path), "--", text])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 0:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()
            found = list(getattr(image, "text", {}).values())
        if not any(text in value for value in found):
            raise Wrong(f"the file says {str(found)[:100]}")


def ours(error: BaseException) -> bool:
    """Whether it is a `VortexError`, of this package or of the nodes' own copy of it."""
    return any(kind.__name__ == "VortexError" for kind in type(error).__mro__)


def numbered(seed: int, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed}:{kind}:{number}")


def one(target: Target, seed: int, kind: str, number: int, scratch: Path) -> BaseException | None:
    """Feed one input. Returns what it raised."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    data, where = target.data(kind, numbered(seed, kind, number))
    try:
        target.feed(kind, data, where, scratch)
    except BaseException as error:
        return error
    return None


def work(target: Target, seed: int, jobs: list[tuple[str, int]], at: mmap.mmap, told: Any, scratch: Path) -> None:
    """In a process of its own: feed `jobs`, and tell in `at` which one runs and since when."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and torch would wait for them
    ctypes.CDLL(None).mallopt(-8, 1)  # one arena: others reserve addresses, which count as memory here
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable()
    warnings.simplefilter("ignore")
    room = psutil.Process().memory_info().vms + GB
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for i, (kind, number) in enumerate(jobs):
        now = (i, int(time.monotonic() * 1000), int(time.process_time() * 1000))
        at[:24] = b"".join(value.to_bytes(8, "little") for value in now)
        error = one(target, seed, kind, number, scratch)
        if error is None or ours(error):
            told.send((i, None, "read" if error is None else type(error).__name__))
        else:
            frames = traceback.extract_tb(error.__traceback__)
            where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "vortex_core" in f.filename
                          or "nodes" in f.filename), "")  # fmt: skip
            told.send((i, f"{type(error).__name__} at {where}: {str(error)[:200]}", "WRONG"))
        del error
    os._exit(0)


class Lane:
    """A process that does jobs. A new one follows after a crash, a hang and every `RECYCLED` inputs."""

    def __init__(self, target: Target, seed: int, jobs: list[tuple[str, int]], scratch: Path) -> None:
        self.target, self.seed, self.jobs, self.scratch = target, seed, jobs, scratch
        self.at = mmap.mmap(-1, 24)
        self.batch: list[tuple[str, int]] = []
        self.done = 0
        self.process: Any = None

    def start(self) -> bool:
        """Fork for the next batch. False if no job is left."""
        self.batch, self.jobs = self.jobs[:RECYCLED], self.jobs[RECYCLED:]
        if not self.batch:
            return False
        self.done, self.at[:24] = 0, bytes(24)
        self.told, child = multiprocessing.Pipe(duplex=False)
        arguments = (self.target, self.seed, self.batch, self.at, child, self.scratch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it warns of a fork beside threads
            self.process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
            self.process.start()
        child.close()
        return True

    def poll(self) -> Iterator[tuple[str, int, str | None, str]]:
        """New findings: kind, number, what is wrong, how it ended."""
        over = False
        try:
            while self.told.poll():
                i, wrong, outcome = self.told.recv()
                self.done = i + 1
                yield (*self.batch[i], wrong, outcome)
        except EOFError:
            over = True
        i, since, used = (int.from_bytes(self.at[k : k + 8], "little") for k in (0, 8, 16))
        if since and self.done == i and (late := self.late(since / 1000, used / 1000)):
            self.process.kill()
            self.process.join()
            yield (*self.batch[i], late, "WRONG")
            self.jobs, self.done = self.batch[i + 1 :] + self.jobs, len(self.batch)
        elif over:
            self.process.join()
            if self.done < len(self.batch):
                wrong = f"ended the process ({self.process.exitcode})"
                yield (*self.batch[self.done], wrong, "WRONG")
                self.jobs = self.batch[self.done + 1 :] + self.jobs
            self.done = len(self.batch)

    def late(self, since: float, used: float) -> str:
        """Which limit the input exceeds that began at `since`, when the process had `used` so many seconds."""
        if time.monotonic() - since <= SECONDS or not self.process.is_alive():
            return ""
        with contextlib.suppress(psutil.Error):  # it may end just now
            times = psutil.Process(self.process.pid).cpu_times()
            if times.user + times.system - used > SECONDS:
                return f"took more than {SECONDS:g} s of a core's time"
        return "took more than a minute" if time.monotonic() - since > MINUTE else ""

    @property
    def idle(self) -> bool:
        return self.done >= len(self.batch) and not self.process.is_alive()


def run(
    inputs: int,
    kinds: list[str],
    seed: int,
    save: Path | None,
    say: Callable[[str], None] = print,
    processes: int = 2,
) -> dict[str, Any]:
    """The figures of a run."""
    started = time.perf_counter()
    shares = {kind: share for kind, share in SHARES.items() if kind in kinds}
    jobs = [(kind, n) for kind, share in shares.items() for n in range(round(inputs * share / sum(shares.values())))]
    random.Random(seed).shuffle(jobs)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in shares}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vortex-fuzz-") as name:
        target = Target(Path(name))
        lanes = [Lane(target, seed, jobs[i::processes], Path(name) / f"lane-{i}") for i in range(processes)]
        told = time.perf_counter()
        working = [lane for lane in lanes if lane.start()]
        while working:
            time.sleep(0.02)
            for lane in working:
                for kind, number, fault, outcome in lane.poll():
                    outcomes[kind][outcome] += 1
                    if fault is not None:
                        wrong.append(f"{kind}:{number} {fault}")
                        keep(target, seed, kind, number, save)
            working = [lane for lane in working if not lane.idle or lane.start()]
            if time.perf_counter() - told > 10:
                told = time.perf_counter()
                done = sum(sum(count.values()) for count in outcomes.values())
                say(f"{done}/{len(jobs)}: {told - started:.0f} s, {len(wrong)} wrong")
    for line in wrong[:200]:
        say(f"WRONG {line}")
    return {
        "inputs": len(jobs),
        "outcomes": {kind: dict(count) for kind, count in outcomes.items()},
        "wrong": len(wrong),
        "such_as": wrong[:10],
        "seconds": round(time.perf_counter() - started, 1),
        "seed": seed,
        "holds": not wrong and sum(sum(count.values()) for count in outcomes.values()) == len(jobs),
    }


def keep(target: Target, seed: int, kind: str, number: int, save: Path | None) -> None:
    """Save an input under its name."""
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        data, where = target.data(kind, numbered(seed, kind, number))
        (save / f"{kind}-{number}-{Path(where).name or 'input'}").write_bytes(data)


def again(name: str, seed: int) -> int:
    """One input, in this process."""
    kind, _, number = name.partition(":")
    with tempfile.TemporaryDirectory(prefix="vortex-fuzz-") as folder:
        target = Target(Path(folder))
        data, where = target.data(kind, numbered(seed, kind, int(number)))
        print(f"{where}: {data[:2000]!r}")
        error = one(target, seed, kind, int(number), Path(folder) / "scratch")
    if error is not None:
        traceback.print_exception(error)
    return int(error is not None and not ours(error))


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=50_000, help="of all kinds together")
    parser.add_argument("--kind", action="append", choices=SHARES, help="may be repeated (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs: the same seed repeats a run")
    parser.add_argument("--save", type=Path, default=Path("fuzz-found"), help="folder for inputs that were wrong")
    parser.add_argument("--processes", type=int, help="processes that take inputs (default: one a core)")
    parser.add_argument("--again", metavar="KIND:NUMBER", help="one input alone")
    given = parser.parse_args()
    if given.again:
        return again(given.again, given.seed)
    processes = given.processes or os.cpu_count() or 2
    figures = run(given.inputs, given.kind or list(SHARES), given.seed, given.save, processes=processes)
    print(json.dumps(figures))
    return int(not figures["holds"])


if __name__ == "__main__":
    sys.exit(main())
