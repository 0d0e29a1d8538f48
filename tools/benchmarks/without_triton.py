"""Measures what draws where Triton is missing, part by part and whole.

    python tools/benchmarks/without_triton.py kernels eight decoder steps    # half a minute
    python tools/benchmarks/without_triton.py random                         # pictures, each way in its own process

`kernels`: each way of a step's functions, in CUDA graphs. `eight`: those of the 8-bit precisions, and the product in
int8. `decoder`: the VAE. `steps`: whole steps in `exact`. The import of Triton is refused, except where its kernels are
measured beside the others (`--triton`). Ways of pictures: `nvrtc`, `bitsandbytes` and `reference` decode, with the
kernels in CUDA C; `int8` and `fp8` are `nvrtc` in these modes, `triton` is Triton in int8; `kitchen` and `torch` are
bitsandbytes with comfy-kitchen's functions or torch's own, as if NVRTC were missing. Figures go to `--json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from random_engine import random_engine

from vortex_core.bench.allocator import ALLOCATORS, environment

WAYS = ("nvrtc", "bitsandbytes", "kitchen", "torch", "reference", "int8", "fp8", "triton")
LAYERS = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))  # N, K
SIDES = (512, 1024)
GB = 1e9
MARK = "WAY "
FIGURES: dict[str, Any] = {}


def note(key: str, value: Any) -> None:
    FIGURES[key] = value
    print(f"{key:58s} {value:.4f}" if isinstance(value, float) else f"{key:58s} {value}", flush=True)


def replayed(*calls: Callable[[], object], replays: int = 7) -> float:
    """Median microseconds of a call, of graphs that hold all of `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls) * 1e3)
    return statistics.median(times[1:])


def ways(triton: bool) -> dict[str, Any]:
    """The kernels to compare, by name."""
    from vortex_core.kernels import compiled, kitchen, library, reference

    functions, words = kitchen.taken(torch.device("cuda", 0))
    note("comfy-kitchen", words)
    found: dict[str, Any] = {"CUDA C": compiled, "torch": library, "reference": reference}
    if functions:
        found["kitchen"] = SimpleNamespace(**{name: getattr(library, name) for name in library.__all__} | functions)
    if triton:
        from vortex_core.kernels import fused

        found["Triton"] = fused
    return found


def kernels(triton: bool) -> None:
    """Microseconds of a step's functions and of decoding, inputs in rotation."""
    from vortex_core.kernels import ScaledTensor
    from vortex_core.quant.backends import BitsAndBytesBackend, bitsandbytes_declined

    device = torch.device("cuda")
    decoders = {name: way.dequantize for name, way in ways(triton).items() if name not in ("torch", "kitchen")}
    if bitsandbytes_declined(device) is None:
        decoders["bitsandbytes"] = lambda packed, absmax, out: BitsAndBytesBackend().write(packed, absmax, out, None)
    for n, k in ((9216, 3072), (3072, 3072), (21504, 3072), (3072, 15360)):
        out = torch.empty(n, k, device=device, dtype=torch.bfloat16)
        count = max(3, 160_000_000 // (n * k))
        weights = [
            (
                torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device),
                torch.rand(n, k // 64, device=device),
            )
            for _ in range(count)
        ]
        for name, decode in decoders.items():
            taken = replayed(*(partial(decode, *weight, out) for weight in weights))
            note(f"decode {n} x {k}, {name}, us", taken)
            note(f"decode {n} x {k}, {name}, TB/s", n * k * 2.5625 / taken / 1e6)
    for tokens in (1280, 4352):
        x, y = torch.randn(2, 8, 1, tokens, 3072, device=device).bfloat16()
        qkv = torch.randn(8, 1, tokens, 3, 24, 128, device=device).bfloat16()
        rows, norms = torch.randn(3, 3072, device=device).bfloat16(), torch.randn(2, 128, device=device).bfloat16()
        angle, out = torch.randn(tokens, 64, device=device), ScaledTensor(torch.empty_like(x[0]))
        cos, sin = angle.cos(), angle.sin()
        for name, way in ways(triton).items():
            note(f"modulate {tokens}, {name}, us", replayed(*(partial(way.modulate, a, *rows[:2], out) for a in x)))
            calls = [partial(way.residual_modulate, a, b, *rows, out) for a, b in zip(x, y, strict=True)]
            note(f"residual_modulate {tokens}, {name}, us", replayed(*calls))
            note(f"rotate {tokens}, {name}, us", replayed(*(partial(way.rotate, a, *norms, cos, sin) for a in qkv)))


def eight(triton: bool) -> None:
    """Microseconds of decoding to 8 bits, of rows, and of the product in int8, with its rate."""
    from vortex_core.kernels import ScaledTensor
    from vortex_core.kernels.scaled_tensor import FP8

    device = torch.device("cuda")
    found = {name: way for name, way in ways(triton).items() if name in ("CUDA C", "Triton")}

    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)

    for n, k in LAYERS:
        scales, count = torch.rand(n, device=device) + 0.5, max(3, 300_000_000 // (n * k))
        packed = [bytes_of(n, k // 2).view(torch.uint8) for _ in range(count)]
        absmax = torch.rand(n, k // 64, device=device)
        for (name, way), dtype in product(found.items(), (torch.int8, FP8)):
            out = torch.empty(n, k, device=device, dtype=dtype)
            taken = replayed(*(partial(way.dequantize, codes, absmax, out, scales) for codes in packed))
            note(f"decode {n} x {k} to {dtype}, {name}, us", taken)
            note(f"decode {n} x {k} to {dtype}, {name}, TB/s", n * k * 1.5625 / taken / 1e6)
        for (name, way), m in product(found.items(), (256, 1280, 4352)):
            weights, bias = [bytes_of(n, k) for _ in range(3)], torch.randn(n, device=device).bfloat16()
            x, out = bytes_of(m, k), torch.empty(m, n, device=device, dtype=torch.bfloat16)
            each = torch.rand(m, device=device)
            taken = replayed(*(partial(way.multiply_int8, x, each, weight, scales, bias, out) for weight in weights))
            note(f"product {m}, {k}, {n}, {name}, us", taken)
            note(f"product {m}, {k}, {n}, {name}, TOPS", 2 * m * k * n / taken / 1e6)
    for tokens, kind in product((1280, 4352), (torch.int8, FP8)):
        x, y = torch.randn(2, 6, 1, tokens, 3072, device=device).bfloat16()
        wide, rows = torch.randn(4, 1, tokens, 12288, device=device).bfloat16(), torch.randn(3, 3072, device=device)
        rows, scale = rows.bfloat16(), torch.empty(1, tokens, device=device)
        out, both = (ScaledTensor(torch.empty(1, tokens, w, dtype=kind, device=device), scale) for w in (3072, 15360))
        for name, way in found.items():
            calls = {
                "modulate": [partial(way.modulate, a, *rows[:2], out) for a in x],
                "residual_modulate": [
                    partial(way.residual_modulate, a, b, *rows, out) for a, b in zip(x, y, strict=True)
                ],
                "gelu": [partial(way.gelu, a, both, b) for a, b in zip(wide, x, strict=False)],
                "quantize": [partial(way.quantize, a, out) for a in x],
            }
            for what, each_call in calls.items():
                note(f"{what} {tokens} to {kind}, {name}, us", replayed(*each_call))


def decoder(triton: bool) -> None:
    """Milliseconds and bytes of a decode, launched and captured."""
    from vortex_core.flux1.decoder_memory import DecoderLayout
    from vortex_core.flux1.spec import VaeSpec
    from vortex_core.flux1.vae import Decoder, decode, library_bytes
    from vortex_core.kernels import reference

    spec, device, expected = VaeSpec(), torch.device("cuda"), {}
    torch.manual_seed(0)
    module = Decoder(spec).to(device, torch.bfloat16).requires_grad_(False)
    module.channels_last()
    found = {name: way for name, way in ways(triton).items() if name not in ("torch", "kitchen")}
    for side in SIDES:
        latents = torch.randn(1, 16, side // 8, side // 8, device=device)
        for rows in (None, 256, 128):
            nbytes = DecoderLayout(spec, side // 8, side // 8, rows, torch.bfloat16).nbytes
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
            for name, way in sorted(found.items(), key=lambda item: item[1] is not reference):
                module.use(way)
                out = torch.empty(1, side, side, 3, device=device)
                call = partial(decode, module, latents, out, rows, memory)
                call()
                expected.setdefault(side, out.clone())
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                taken = []
                for _ in range(4):
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    call()
                    torch.cuda.synchronize()
                    taken.append(1e3 * (time.perf_counter() - started))
                key = f"decoder {side}, strips of {rows}, {name}"
                note(f"{key}, ms", min(taken))
                note(f"{key}, library MB", (torch.cuda.max_memory_allocated() - before) / 1e6)
                note(f"{key}, captured, ms", replayed(call) / 1e3)
                limit = library_bytes(spec, side // 8, side // 8, torch.bfloat16, way)
                note(f"{key}, said MB", limit / 1e6)
                note(f"{key}, mean off of 255", float((out - expected[side]).abs().mean() * 255))


def steps(triton: bool) -> None:
    """Milliseconds of a captured step in `exact`, and its distance from the reference's."""
    import measure_speed as speed

    from vortex_core.flux1 import sampling
    from vortex_core.memory.arena import Region
    from vortex_core.memory.offload import Prefetcher
    from vortex_core.quant.backends import BACKENDS, backend_declined, choose_backend
    from vortex_core.runtime.graphs import GraphCache, step_bytes

    device, spec = torch.device("cuda", 0), speed.SPEC
    backends = {name: choose_backend(device, name) for name in BACKENDS if backend_declined(name, device) is None}
    speed.BACKEND = backends["reference"]
    model = speed.transformer()
    for side in SIDES:
        tokens = (side // 16) ** 2
        img = torch.randn(1, tokens, 64, device=device)
        txt = torch.randn(1, 256, spec.hidden, device=device).bfloat16()
        table = torch.randn(spec.modulation_rows, spec.hidden, device=device).bfloat16() / 4
        pe, expected = sampling.rope(sampling.positions(side, side, 256), spec, device), None
        size = (1, 256, tokens)
        region = Region(torch.empty(step_bytes(spec, size, torch.bfloat16) + 2**28, dtype=torch.uint8, device=device))
        scratch = region.take((21504 * 3072 * 2,), torch.uint8)
        start = region.used
        for name, way in sorted(ways(triton).items(), key=lambda item: item[0] != "reference"):
            for backend in ("nvrtc", "bitsandbytes") if name != "Triton" else ("triton",):
                if backend not in backends or (name == "reference" and backend == "nvrtc"):
                    continue
                for linear in model.linears():
                    linear.backend = backends[backend]
                model.use(way)
                graphs = GraphCache(model, device, way.step_bytes(spec.hidden))
                velocity = graphs.open(size, region.again(start), Prefetcher([], device))
                with backends[backend].using(scratch):
                    eager = velocity(img, txt, table, pe).clone()
                    first = velocity(img, txt, table, pe).clone()
                    taken = []
                    for _ in range(8):
                        begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        begin.record()
                        velocity(img, txt, table, pe)
                        stop.record()
                        torch.cuda.synchronize()
                        taken.append(begin.elapsed_time(stop))
                expected = first if expected is None else expected
                key = f"step {side}, {name}, {backend}"
                note(f"{key}, ms", statistics.median(taken))
                note(f"{key}, replay equals launched", bool(torch.equal(eager, first)))
                note(f"{key}, off", float((first - expected).norm() / expected.norm()))
                note(f"{key}, graph MB of planned", [graphs.nbytes / 1e6, graphs.planned / 1e6])
                graphs.clear()
                torch.cuda.empty_cache()


def refuse(module: str) -> None:
    """Have every import of `module` fail from now on."""
    sys.modules[module] = None  # type: ignore[assignment]


def picture(model: str, way: str, cache: str | None) -> None:
    """Draw with one way, in this process; prints its figures."""
    from unittest.mock import patch

    from vortex_core import Engine, kernels
    from vortex_core.device.vram import graph_memory

    if way in ("kitchen", "torch"):
        patch.object(kernels, "compiled_declined", lambda device: "as if it were missing").start()
    if way != "kitchen":
        refuse("comfy_kitchen")
    backends = {"int8": "nvrtc", "fp8": "nvrtc", "kitchen": "bitsandbytes", "torch": "bitsandbytes"}
    mode = way if way in ("int8", "fp8") else "int8" if way == "triton" else "exact"
    options: dict[str, Any] = {"backend": backends.get(way, way), "vram_budget": 6.5, "mode": mode}
    if model == "random":
        engine = random_engine("cuda", **options)
    else:
        engine = Engine.load(model, device="cuda", cache_dir=cache, **options)
    for side in SIDES:
        torch.cuda.reset_peak_memory_stats()
        draw = partial(engine.generate, "a red circle", seed=1, height=side, width=side)
        first = draw().clone()
        draw()
        taken = []
        for _ in range(8):
            torch.cuda.synchronize()
            started = time.perf_counter()
            last = draw()
            torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - started))
        peak = torch.cuda.max_memory_reserved() + graph_memory(engine.device)
        figures = {
            "way": way, "side": side, "ms": statistics.median(taken), "least_ms": min(taken), "peak_gb": peak / GB,
            "plan_gb": engine.plan.peak / GB, "budget_gb": 6.5, "same": bool(torch.equal(first, last)),
            "captured": bool(engine.captured), "bits": sha256(first.cpu().numpy().tobytes()).hexdigest(),
        }  # fmt: skip
        print(MARK + json.dumps(figures), flush=True)


def pictures(model: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way in a process of its own, twice, so that bits can be compared from run to run."""
    rows: list[dict[str, Any]] = []
    for allocator in asked.allocators.split(","):
        for way in [way for way in asked.ways.split(",") for _ in range(asked.runs)]:
            command = [
                sys.executable,
                __file__,
                model,
                "--way",
                way,
                *(["--cache", asked.cache] if asked.cache else []),
            ]
            found = subprocess.run(
                command, env=environment(allocator), capture_output=True, text=True, check=False, timeout=300
            )
            lines = [line for line in found.stdout.splitlines() if line.startswith(MARK)]
            if found.returncode:
                print(found.stderr[-2000:])
            for line in lines:
                row = {"allocator": allocator, **json.loads(line.removeprefix(MARK))}
                rows.append(row)
                before = [other for other in rows if (other["side"], other["way"]) == (row["side"], row["way"])]
                holds = row["same"] and row["peak_gb"] <= row["plan_gb"] <= row["budget_gb"]
                bits = len({other["bits"] for other in before}) == 1
                print(
                    f"{way:12s} {allocator:15s} {row['side']:5d} {row['ms']:7.1f} ms, {row['peak_gb']:.3f} of "
                    f"{row['plan_gb']:.3f} GB, {'holds' if holds and bits else 'BROKEN'}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="kernels, eight, decoder, steps, a model, or random")
    parser.add_argument("--triton", action="store_true", help="measure Triton's kernels, too")
    parser.add_argument("--ways", default=",".join(WAYS[:4]), help=f"of whole pictures: {', '.join(WAYS)}")
    parser.add_argument("--allocators", default=",".join(ALLOCATORS), help="torch's, of whole pictures")
    parser.add_argument("--runs", type=int, default=2, help="processes for each way and allocator (default 2)")
    parser.add_argument("--cache", default=os.environ.get("VORTEX_CACHE"), help="where quantized weights are kept")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.triton and asked.way != "triton":
        refuse("triton")
    sections = {"kernels": kernels, "eight": eight, "decoder": decoder, "steps": steps}
    for what in asked.what:
        if asked.way:
            picture(what, asked.way, asked.cache)
            return
        with torch.inference_mode():
            if what in sections:
                sections[what](asked.triton)
            else:
                FIGURES["pictures"] = pictures(what, asked)
        if asked.json:
            asked.json.write_text(json.dumps(FIGURES, indent=1))


if __name__ == "__main__":
    main()
