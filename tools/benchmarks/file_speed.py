"""Measures seconds and host memory of reading a model's files, each in a process of its own.

    python tools/benchmarks/full_size.py files /dev/shm/random-schnell

Seconds count from when torch, the CUDA context and bitsandbytes are ready. Host memory is resident memory without the
pages of the model's own mapped files. It is read five times a second, in a run that is not timed.
"""

from __future__ import annotations

import json
import logging.handlers
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vortex_core.utils.timing import Stopwatch, mark

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
REPEATS = 3
LIMIT = 120  # seconds that a measure may take
console = Console()


def quantize(folder: Path, work: Path) -> dict[str, Any]:
    """Quantize the transformer into a new cache, on the device."""
    shutil.rmtree(work / "cache", ignore_errors=True)
    started = time.perf_counter()
    _from_cache(folder, work / "cache", fill=False)
    seconds = time.perf_counter() - started
    return {"quantize_s": seconds, "cached_bytes": _cached(work, "transformer").stat().st_size}


def load(folder: Path, work: Path) -> dict[str, Any]:
    """The transformer from the cache, in turns with safetensors' own reading of the same file, both to the device."""
    phases: dict[str, list[float]] = {}

    def ours() -> None:
        with Stopwatch(DEVICE) as watch:
            _from_cache(folder, work / "cache", fill=True)
        for phase, seconds in watch.phases.items():
            phases.setdefault(phase, []).append(seconds)

    figures = _in_turns(load_s=ours, safetensors_s=lambda: _read([_cached(work, "transformer")]))
    figures["load_each_s"] = figures.pop("each")
    return figures | {"load_phases_s": {phase: statistics.median(times) for phase, times in phases.items()}}


def quantize_memory(folder: Path, work: Path) -> dict[str, Any]:
    """Host memory while quantizing into a new cache."""
    shutil.rmtree(work / "cache-2", ignore_errors=True)
    with _host_memory(folder, work) as seen:
        _from_cache(folder, work / "cache-2", fill=False)
    shutil.rmtree(work / "cache-2")
    return {"quantize_host_bytes": max(seen), "quantize_host_bytes_before": seen[0]}


def engine(folder: Path, work: Path) -> dict[str, Any]:
    """The whole engine: the first time, which also quantizes T5, then from the cache, in turns with safetensors."""
    from vortex_core import Engine, load_flux_schnell

    log, told = logging.getLogger("vortex_core.runtime.loading"), logging.handlers.BufferingHandler(100)
    log.addHandler(told)
    log.setLevel(logging.DEBUG)
    engines: list[Engine] = []

    def load() -> None:
        engines.append(load_flux_schnell(folder, device=DEVICE, cache_dir=work / "cache"))

    def unload() -> None:
        for engine in engines:
            engine.unload()
        engines.clear()

    started = time.perf_counter()
    load()
    first = time.perf_counter() - started
    unload()
    files = [_cached(work, "transformer"), _cached(work, "t5")]
    files += [path for part in ("text_encoder", "vae") for path in (folder / part).glob("*.safetensors")]
    figures = _in_turns(unload, engine_s=load, engine_safetensors_s=lambda: _read(files))
    figures["engine_each_s"] = figures.pop("each")
    return {"engine_t5_new_s": first, **figures, "engine_phases": [record.getMessage() for record in told.buffer]}


def diffusers(folder: Path, work: Path) -> dict[str, Any]:
    """diffusers' `from_pretrained` with `BitsAndBytesConfig` on the transformer."""
    started = time.perf_counter()
    _diffusers(folder)
    return {"diffusers_s": time.perf_counter() - started}


def diffusers_memory(folder: Path, work: Path) -> dict[str, Any]:
    """Host memory while diffusers does that."""
    with _host_memory(folder, work) as seen:
        _diffusers(folder)
    return {"diffusers_host_bytes": max(seen), "diffusers_host_bytes_before": seen[0]}


def diffusers_reads_ours(folder: Path, work: Path) -> dict[str, Any]:
    """Write a folder for diffusers, load it there, and compare one of its weights with Vortex's own."""
    from bitsandbytes.functional import dequantize_4bit
    from diffusers import FluxTransformer2DModel

    from vortex_core import nf4
    from vortex_core.checkpoint.bundle import find_parts
    from vortex_core.checkpoint.quantize import quantize_file

    path = quantize_file(folder, work / "for-diffusers", device=DEVICE)
    started = time.perf_counter()
    model = FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16).to(DEVICE)
    seconds = time.perf_counter() - started
    weight = model.single_transformer_blocks[0].proj_out.weight
    ours = find_parts(path, {})[0]["transformer"].tensors.read_nf4("single_blocks.0.linear2.weight", DEVICE)
    same = torch.equal(dequantize_4bit(weight.data, weight.quant_state), nf4.dequantize(ours, torch.bfloat16))
    with torch.inference_mode():
        shapes = {"hidden_states": (1, 64, 64), "encoder_hidden_states": (1, 16, model.config.joint_attention_dim)}
        inputs = {name: torch.randn(shape, device=DEVICE).bfloat16() for name, shape in shapes.items()}
        pooled = torch.randn(1, model.config.pooled_projection_dim, device=DEVICE).bfloat16()
        ids = {"img_ids": torch.zeros(64, 3, device=DEVICE), "txt_ids": torch.zeros(16, 3, device=DEVICE)}
        time_ = torch.tensor([1.0], device=DEVICE).bfloat16()
        out = model(**inputs, **ids, pooled_projections=pooled, timestep=time_).sample
    shutil.rmtree(path)
    return {"diffusers_reads_ours": bool(same and out.isfinite().all()), "diffusers_reads_ours_s": seconds}


MEASURES: tuple[Callable[[Path, Path], dict[str, Any]], ...] = (
    quantize, load, quantize_memory, diffusers, diffusers_memory, diffusers_reads_ours, engine,
)  # fmt: skip


def measure_files(folder: Path, work: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run every measure, or `only` these. Returns the figures, with errors under `failed`."""
    work.mkdir(exist_ok=True)
    figures: dict[str, Any] = {"failed": {}}
    try:
        for measure in (m for m in MEASURES if not only or m.__name__ in only):
            started = time.perf_counter()
            command = [sys.executable, __file__, measure.__name__, str(folder), str(work)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                figures |= found
                console.print(f"{measure.__name__}: {found} ({time.perf_counter() - started:.0f} s in all)")
            except (subprocess.SubprocessError, ValueError, IndexError) as error:
                reason = (getattr(error, "stderr", None) or str(error))[-1500:]
                figures["failed"][measure.__name__] = reason
                console.print(f"{measure.__name__} failed: {reason}", markup=False)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return figures


def report(figures: dict[str, Any]) -> None:
    """Print the figures as a table, with their goals."""
    table = Table("", "Vortex", "safetensors", "diffusers + bitsandbytes", "must hold")

    def row(name: str, form: str, *values: Any, goal: str = "") -> None:
        table.add_row(name, *("" if value is None else form.format(value) for value in values), goal)

    def gb(key: str) -> float | None:
        return figures[key] / 1e9 if key in figures else None

    get = figures.get
    row("quantize the transformer, s", "{:.1f}", get("quantize_s"), None, get("diffusers_s"), goal="<= 20")
    memory = gb("quantize_host_bytes"), None, gb("diffusers_host_bytes")
    row("host memory meanwhile, without the mapped files, GB", "{:.2f}", *memory, goal="<= 2.5")
    before = gb("quantize_host_bytes_before"), None, gb("diffusers_host_bytes_before")
    row("of that, before it began, GB", "{:.2f}", *before)
    row("cached transformer to the GPU, s", "{:.2f}", get("load_s"), get("safetensors_s"), None, goal="ratio <= 1.3")
    if "load_s" in figures and "safetensors_s" in figures:
        row("ratio", "{:.2f}", figures["load_s"] / figures["safetensors_s"], None, None)
    for phase, seconds in get("load_phases_s", {}).items():
        row(f"  {phase}, s", "{:.2f}", seconds, None, None)
    row("whole engine from the cache, s", "{:.2f}", get("engine_s"), get("engine_safetensors_s"), None)
    row("its folder loads in diffusers, s", "{:.1f}", None, None, get("diffusers_reads_ours_s"))
    console.print(table)


def _from_cache(folder: Path, cache: Path, *, fill: bool) -> None:
    from vortex_core.checkpoint.bundle import describe, find_parts
    from vortex_core.checkpoint.cache import Cache
    from vortex_core.flux1.conditioning import Modulation
    from vortex_core.flux1.transformer import Transformer
    from vortex_core.quant.backends import ReferenceBackend
    from vortex_core.storage.materialize import Target, check, materialize, pack

    parts, configs = find_parts(folder, {})
    part = parts["transformer"]
    spec = describe("transformer", part, configs.get("transformer"))
    mark("headers")
    with torch.device("meta"):
        halves = (Transformer(spec), Modulation(spec))
    mark("modules")
    target = Target(DEVICE, torch.bfloat16)
    for half in halves:
        pack(half, "", ReferenceBackend())
    with torch.inference_mode():
        tensors = Cache(cache).quantized(part, "transformer", [(half, "") for half in halves], target)
        mark("cache")
        for half in halves if fill else ():
            check(half, tensors)
            mark("check")
            materialize(half, tensors, target)
            mark("weights")


def _read(files: list[Path]) -> None:
    from safetensors.torch import load_file

    held = [load_file(path, device=str(DEVICE)) for path in files]
    _synchronize()
    del held


def _cached(work: Path, kind: str) -> Path:
    (path,) = (work / "cache").glob(f"{kind}-*.safetensors")
    return path


def _diffusers(folder: Path) -> None:
    from diffusers import BitsAndBytesConfig, FluxTransformer2DModel

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=nf4, torch_dtype=torch.bfloat16
    )
    _synchronize()


def _in_turns(after: Callable[[], object] = lambda: None, **works: Callable[[], object]) -> dict[str, Any]:
    """Seconds of each, `REPEATS` times in turns, and the medians. `after` and freeing memory are not timed."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            _synchronize()
            started = time.perf_counter()
            work()
            _synchronize()
            times[name].append(time.perf_counter() - started)
            after()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    return {name: statistics.median(found) for name, found in times.items()} | {"each": times}


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _host_memory(*mapped: Path) -> Iterator[list[int]]:
    """Resident bytes without the pages of files below `mapped`, five times a second, the first before the work."""
    seen = [_resident(mapped)]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            seen.append(_resident(mapped))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _resident(mapped: tuple[Path, ...]) -> int:
    total, skip = 0, False
    folders = tuple(str(path.resolve()) for path in mapped)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            total += 0 if skip else int(line.split()[1]) * 1024
        elif "-" in line.split(maxsplit=1)[0]:  # a mapping's first line: addresses, rights, ..., path
            skip = any(folder in line for folder in folders)
    return total


def main() -> None:
    """Run one measure in this process, and print its figures as one line of JSON."""
    measure, folder, work = sys.argv[1:]
    import bitsandbytes  # noqa: F401

    import vortex_core.runtime.engine  # noqa: F401
    from vortex_core.checkpoint import cache

    cache.SMALLEST = 0  # the miniature too
    torch.zeros(1, device=DEVICE)
    _synchronize()
    (chosen,) = (m for m in MEASURES if m.__name__ == measure)
    print(json.dumps(chosen(Path(folder), Path(work))))


if __name__ == "__main__":
    main()
