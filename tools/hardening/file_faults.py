"""Faults of files, disks and whole processes, for tools/hardening/faults.py.

Each runs in a process of its own, which may die, with the miniature on the CPU: a fork has no CUDA.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from traps import ACTS, Trap, kill, trapped
from typer.testing import CliRunner

from vortex_core import VortexError
from vortex_core.checkpoint.quantize import quantize_file
from vortex_core.cli.main import app

if TYPE_CHECKING:
    from faults import Bench, Row


def apart(work: Callable[..., None], *arguments: Any, limit: float = 120) -> int:
    """Run `work` in a process of its own. Returns its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it warns of a fork beside threads; here they are idle
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return -signal.SIGALRM
    return int(process.exitcode or 0)


def digest(picture: Tensor, expected: Tensor) -> int:
    """How a process of its own ends: 0 for the right picture, 3 for another."""
    return 0 if torch.equal(picture.cpu(), expected) else 3


def in_child(work: Callable[[], int]) -> None:
    """The end of a process: 0 right, 3 wrong picture, 4 an error of ours, 5 another."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and torch would wait for them
    try:
        code = work()
    except VortexError:
        code = 4
    except BaseException as error:
        print(f"       {type(error).__name__}: {error}", flush=True)
        code = 5
    os._exit(code)


SAID = {
    0: "done, right", 3: "WRONG PICTURE", 4: "VortexError", 5: "another exception", 8: "NOT INJECTED",
    6: "NOT RUN: no disk of our own here", 7: "a file was left", -9: "killed", -7: "SIGBUS", -14: "hung",
}  # fmt: skip


def killed(
    bench: Bench, stage: str | None, work: Callable[[], object], again: Callable[[], Tensor], name: str = ""
) -> None:
    """Kill a process in `stage` of `work`; then do the same work `again`."""

    def child(at: int) -> None:
        torch.set_num_threads(1)
        with trapped(), Trap(stage, at if stage else float("inf"), kill):
            work()
        os._exit(0)

    def once(row: Row) -> None:
        code = apart(child, bench.random.randint(1, 6))
        row.happened[SAID.get(code, str(code))] += 1
        row.injected += code == -9
        bench.then(row, again)
        bench.then(row, lambda: bench.engine.generate(**bench.draw))

    bench.run(name or stage or "", "killed process", once)


def write_over(path: Path) -> None:
    """Other bytes in the same file, of the same size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(os.urandom(path.stat().st_size // 2))


def replace(path: Path) -> None:
    """Another file in its place."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4096] + bytes(4096))
    os.replace(other, path)


SUBFOLDERS = {"clip": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
DISKS = ("cache write", "copy out", "quantize", "log")
CHANGES: dict[str, Callable[[Path], None]] = {
    "file cut short": lambda path: os.truncate(path, path.stat().st_size // 3),
    "file replaced": replace,
    "file rewritten": write_over,
    "file removed": Path.unlink,
}


def changed(bench: Bench, folder: Path, part: str, fault: str, *, cached: bool) -> None:
    """Change a file while it is read, at a random moment; then restore it."""
    model = folder / "changing"
    options = {"cache_dir": bench.cache} if cached else {}

    def once(row: Row) -> None:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(bench.model, model)
        (path,) = (model / part).glob("*.safetensors")
        moment = bench.random.random()

        def load() -> int:
            done = []

            def on_progress(count: int, total: int) -> None:
                if not done and count >= moment * total * (0.5 if cached else 1):
                    done.append(CHANGES[fault](path))

            with bench.load(model, on_progress=on_progress, **options) as engine:
                return digest(engine.generate(**bench.draw), bench.expected)

        code = apart(in_child, load)
        row.happened[SAID.get(code, str(code))] += 1
        row.injected += 1
        if code not in (0, 4):
            row.wrong.append(SAID.get(code, f"exit {code}"))
        shutil.copy2(Path(bench.model) / part / path.name, path)
        bench.then(row, lambda: bench.drawn(model=model, **options))

    bench.run(f"load {part}{', cached' if cached else ''}", fault, once)


def bit(path: Path, at: int) -> None:
    """One bit flipped."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def damage(path: Path, what: str, where: float) -> None:
    """Change an entry of the cache. `where`: the place of the change, as a share of the whole."""
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    size, manifest = path.stat().st_size, path.with_suffix(".json")
    if what == "a bit of the header":
        bit(path, int(where * header))
    elif what == "a bit of the data":
        bit(path, int(header + where * (size - header)))
    elif what == "cut short":
        os.truncate(path, int(where * size))
    elif what == "another file's bytes":
        path.write_bytes(os.urandom(size))
    elif what == "no manifest":
        manifest.unlink()
    elif what == "manifest cut short":
        manifest.write_text(manifest.read_text()[: int(where * manifest.stat().st_size)])
    else:
        manifest.write_text(json.dumps([{"source": 1}]))


DAMAGES = (
    *("a bit of the header", "a bit of the data", "cut short", "another file's bytes"),
    *("no manifest", "manifest cut short", "manifest of another"),
)


def damaged(bench: Bench, what: str) -> None:
    """An entry of the cache that differs from what was written."""

    def once(row: Row) -> None:
        bench.drawn(cache_dir=bench.cache)
        entry = bench.random.choice(sorted(bench.cache.glob("*.safetensors")))
        if "manifest" in what and not entry.with_suffix(".json").exists():
            row.happened["there is no manifest"] += 1
        else:
            damage(entry, what, bench.random.random())
            bench.attempt(row, lambda: bench.drawn(cache_dir=bench.cache), bench.expected)
        row.injected += 1
        bench.then(row, lambda: bench.drawn(cache_dir=bench.cache))

    bench.run("cache entry", what, once)


def small_disk(folder: Path, size: str) -> bool:
    """Give this process, which has one thread, a disk of `size` at `folder`. False where that is not possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    mounts, users = 0x20000, 0x10000000
    if libc.unshare(mounts) and libc.unshare(mounts | users):
        return False
    libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None)  # recursive and private: nobody else sees the disk
    return not libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode())


def refused(work: Callable[[], object]) -> int:
    """The exit code of a child whose `work` must fail with an error of ours."""
    try:
        work()
    except (OSError, VortexError):
        return 0
    return 3


def disk_full(bench: Bench, stage: str) -> None:
    """The cache, a PNG, a quantized file or the log on a full disk that reports free space until it fails."""
    folder = bench.cache

    def cache_write() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return digest(bench.drawn(cache_dir=folder), bench.expected)

    def copy_out() -> int:
        (folder / "full").write_bytes(bytes(2**19))
        return 0 if command(bench, folder / "a.png") != 0 else 3

    def quantize() -> int:
        return refused(lambda: quantize_file(bench.model, folder / "nf4.safetensors", device="cpu"))

    def log() -> int:
        import logging

        (folder / "full").write_bytes(bytes(2**19))
        logging.raiseExceptions = False
        logging.basicConfig(filename=folder / "log", level=logging.DEBUG, force=True)
        logging.info("%s", "x" * 2**20)
        return digest(bench.drawn(), bench.expected)

    works: dict[str, Callable[[], int]] = {
        "cache write": cache_write, "copy out": copy_out, "quantize": quantize, "log": log,
    }  # fmt: skip

    def child() -> int:
        (weights,) = (Path(bench.model) / "transformer").glob("*.safetensors")
        size = 2**19 if stage in ("copy out", "log") else weights.stat().st_size // 8
        if not small_disk(folder, str(size)):
            return 6
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40)  # as a quota has it
        code = works[stage]()
        left = [path.name for path in folder.iterdir() if path.name not in ("log", "full")]
        if any(name.startswith("transformer-") and name.endswith(".safetensors") for name in left):
            return 8  # there was room
        return 7 if any(name.startswith(".") or stage in ("copy out", "quantize") for name in left) else code

    def once(row: Row) -> None:
        folder.mkdir(exist_ok=True)
        code = apart(in_child, child)
        said = {
            6: "NOT RUN: no disk of our own here",
            7: "a file was left",
            8: "NOT INJECTED",
            0: "done, or refused in words",
        }
        row.happened[said.get(code, SAID.get(code, str(code)))] += 1
        row.injected += 1
        if code not in (0, 6):
            row.wrong.append(said.get(code, SAID.get(code, str(code))))
        bench.then(row, lambda: bench.engine.generate(**bench.draw))

    bench.run(stage, "disk full", once)


def killed_quantize(bench: Bench) -> None:
    """Kill `vortex quantize` while it writes. The next run must write the file, and leave nothing else."""
    target = bench.out / "nf4.safetensors"

    def again() -> Tensor:
        quantize_file(bench.model, target, device="cpu")
        parts = {kind: Path(bench.model) / sub for kind, sub in SUBFOLDERS.items()}
        return bench.drawn(model=target, tokenizers=bench.model, **parts)

    killed(bench, "cache write", lambda: quantize_file(bench.model, target, device="cpu"), again, "quantize")


def command(bench: Bench, path: Path, *more: str) -> int:
    """Run `vortex generate` in this process. Returns its exit code, and raises what it does not handle."""
    size = f"{bench.draw['width']}x{bench.draw['height']}"
    options = {"model": bench.model, "seed": bench.draw["seed"], "steps": bench.draw["steps"], "size": size}
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    asked = ["generate", *given, "--device", "cpu", "-o", str(path), *more, bench.draw["prompt"]]
    result = CliRunner().invoke(app, asked)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


def written(bench: Bench, path: Path) -> Tensor:
    """The outcome of the command, which writes to `path`: the expected picture if its file is equal."""
    command(bench, path, "--overwrite")
    with Image.open(path) as image:
        found = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    wanted = bench.expected[0].mul(255).round().byte().flatten()
    return bench.expected if torch.equal(found, wanted) else found


def copy_out_fails(bench: Bench, fault: str) -> None:
    """A fault while a picture is written to its file."""
    path = bench.out / "picture.png"

    def once(row: Row) -> None:
        path.unlink(missing_ok=True)
        with Trap("copy out", 1, ACTS[fault]) as trap:
            try:
                row.happened[f"exit code {command(bench, path)}"] += 1
            except BaseException as error:
                row.happened[type(error).__name__] += 1
        row.injected += trap.sprung
        if path.exists():
            row.wrong.append("a file, though it failed")
        bench.then(row, lambda: written(bench, path))

    bench.run("copy out", fault, once)


def killed_png(bench: Bench) -> None:
    """Kill a process while it writes a picture. The next one must write it, and leave nothing else."""
    path = bench.out / "picture.png"

    def write() -> None:
        os.replace = os.link = os.rename = lambda *paths, **options: kill()
        command(bench, path)

    killed(bench, None, write, lambda: written(bench, path), "copy out")


def all_of(bench: Bench, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Every row of this file whose stage is `wanted`."""
    cached = {"cache_dir": bench.cache}
    rows: list[tuple[str, Callable[[], None]]] = [
        *((f"load {part}", lambda part=part: killed(bench, f"load {part}", bench.drawn, bench.drawn))
          for part in PARTS),
        ("cache write", lambda: killed(bench, "cache write", lambda: bench.drawn(**cached),
                                       lambda: bench.drawn(**cached))),
        ("step", lambda: killed(bench, "step", bench.drawn, bench.drawn)),
        ("quantize", lambda: killed_quantize(bench)),
        ("copy out", lambda: killed_png(bench)),
        *(("copy out", lambda fault=fault: copy_out_fails(bench, fault)) for fault in [*list(ACTS)[:2], "Ctrl-C"]),
        *((f"load {part}{', cached' if kept else ''}",
           lambda part=part, fault=fault, kept=kept: changed(bench, folder, part, fault, cached=kept))
          for fault in CHANGES for part, kept in (("transformer", False), ("transformer", True), ("vae", False))),
        *(("cache entry", lambda what=what: damaged(bench, what)) for what in DAMAGES),
        *((stage, lambda stage=stage: disk_full(bench, stage)) for stage in DISKS),
    ]  # fmt: skip
    for stage, row in rows:
        if wanted(stage):
            row()
