"""Measure kernels, products, steps and decodes at full size: `python tools/benchmarks/measure_speed.py [section ...]`.

Weights are random. Prints tables as it goes and writes `speed.json` into $OUT (default: here). Needs a CUDA device.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vortex_core import nf4
from vortex_core.flux1 import sampling
from vortex_core.flux1.spec import FluxSpec, VaeSpec
from vortex_core.flux1.transformer import Transformer
from vortex_core.flux1.vae import Decoder
from vortex_core.flux1.vae import decode as decode_picture
from vortex_core.kernels import ScaledTensor, choose_kernels, reference
from vortex_core.kernels.scaled_tensor import FP8, empty_heads
from vortex_core.memory.arena import Region, aligned
from vortex_core.memory.offload import Prefetcher
from vortex_core.quant.backends import ReferenceBackend, TritonBackend
from vortex_core.quant.linear import NF4Linear
from vortex_core.quant.precision import EXACT, Fp8, Int8, Precision
from vortex_core.runtime.graphs import GraphCache, step_bytes
from vortex_core.storage.materialize import is_quantized

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = not GPU or os.environ.get("SMALL") == "1"
BF16 = torch.bfloat16
SPEC = FluxSpec(hidden=256, heads=2, double_blocks=2, single_blocks=2) if SMALL else FluxSpec()
SIZES = [(64, 64)] if SMALL else [(512, 512), (1024, 1024)]
LINEARS = [(9216, 3072), (12288, 3072), (3072, 12288), (3072, 3072), (21504, 3072), (3072, 15360)]
if SMALL:
    LINEARS = [(768, 256), (256, 1024)]
TOKENS = [8] if SMALL else [256, 1024, 1280, 4096, 4352]
RESULTS: dict[str, object] = {}


def note(key: str, value: object, text: str = "") -> None:
    RESULTS[key] = value
    print(f"{key:58s} {text or value}", flush=True)


def timed(key: str, ms: float, *, moved: float = 0, flops: float = 0) -> None:
    rate = f"{moved / max(ms, 1e-9) / 1e9:5.2f} TB/s" if moved else f"{flops / max(ms, 1e-9) / 1e9:5.0f} TFLOP/s"
    note(key, ms, f"{1e3 * ms:8.1f} us  {rate}")


def bench(*calls: Callable[[], object], replays: int = 5, repeat: int = 1) -> float:
    """Median milliseconds of one call, from replays of a graph that holds all of `calls` (inputs in rotation)."""
    if not GPU:
        for call in calls:
            call()
        return 0.0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    times = []
    graph.replay()
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls) / repeat)
    return statistics.median(times)


def weight(n: int, k: int) -> NF4Linear:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    absmax = (torch.rand(n, k // 64, device=DEVICE) + 0.5) / 0.55 / k**0.5
    return NF4Linear(nf4.NF4Weight(packed, absmax), torch.randn(n, device=DEVICE, dtype=BF16) / 10, BACKEND)


def operand(m: int, k: int, precision: Precision) -> ScaledTensor:
    values = torch.randn(1, m, k, device=DEVICE, dtype=BF16)
    if precision.operand is None:
        return ScaledTensor(values)
    x = ScaledTensor(torch.empty_like(values, dtype=precision.operand), torch.empty(1, m, device=DEVICE))
    KERNELS.quantize(values, x)
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# --- sections ---------------------------------------------------------------------------------------------------


def ceilings() -> None:
    if not GPU:
        return
    note("gpu", torch.cuda.get_device_name())
    note("torch", torch.__version__)
    a, b = (torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    ms = bench(lambda: a.copy_(b), repeat=3)
    note("copy TB/s", round(2 * 2**30 / ms / 1e9, 3))
    x, y = torch.randn(8192, 8192, device=DEVICE, dtype=BF16), torch.randn(8192, 8192, device=DEVICE, dtype=BF16)
    note("bf16 TFLOP/s at 8192", round(2 * 8192**3 / bench(lambda: x @ y) / 1e9))


def decode() -> None:
    """Decode weights in rotation, so that packed values come from memory, not from a cache."""
    for n, k in LINEARS:
        weights = [weight(n, k) for _ in range(2 if SMALL else max(3, 160_000_000 // (n * k)))]
        for precision in PRECISIONS:
            out = torch.empty(n, k, device=DEVICE, dtype=precision.operand or BF16)
            for w in weights:
                w.use(precision)
            calls = [partial(fill, w, out) for w in weights]
            timed(f"decode {n}x{k} {precision.name}", bench(*calls), moved=n * k * (0.5625 + out.itemsize))


def fill(linear: NF4Linear, out: Tensor) -> None:
    KERNELS.dequantize(linear.packed, linear.absmax, out, linear.row_scale)


def products() -> None:
    """Every linear: its product alone, and with the decode before it."""
    for n, k in LINEARS:
        weights = [weight(n, k) for _ in range(2 if SMALL else 4)]
        for m in TOKENS:
            out = torch.empty(m, n, device=DEVICE, dtype=BF16)
            for precision in PRECISIONS:
                x = operand(m, k, precision)
                decoded = torch.empty(n, k, device=DEVICE, dtype=precision.operand or BF16)
                scale = None if x.scale is None else x.scale[0]
                for w in weights:
                    w.use(precision)

                def multiply(w):
                    w.precision.product(x.values[0], scale, decoded, w.row_scale, w.bias, out)

                def both(w):
                    fill(w, decoded)
                    multiply(w)

                fill(weights[0], decoded)
                flops = 2 * m * n * k
                name = f"linear {m}x{k}x{n} {precision.name}"
                timed(name, bench(*[partial(multiply, w) for w in weights]), flops=flops)
                timed(f"{name} with decode", bench(*[partial(both, w) for w in weights]), flops=flops)


def rows() -> None:
    """The element-wise kernels, at 512 x 512 and 1024 x 1024."""
    d, mlp = SPEC.hidden, SPEC.mlp
    for tokens in [8] if SMALL else [1280, 4352]:
        x, y = torch.randn(2, 1, tokens, d, device=DEVICE).to(BF16)
        wide = torch.randn(1, tokens, 3 * d + mlp, device=DEVICE).to(BF16)
        attn = torch.randn(1, tokens, d, device=DEVICE).to(BF16)
        mod = torch.randn(3, d, device=DEVICE).to(BF16) / 10
        norm = torch.rand(2, SPEC.head_dim, device=DEVICE).to(BF16) + 0.5
        angle = torch.randn(tokens, SPEC.head_dim // 2, device=DEVICE)
        qkv = wide[..., : 3 * d].unflatten(-1, (3, SPEC.heads, SPEC.head_dim))
        for kind in (FP8, torch.int8, BF16):
            normal, hidden, both = (
                ScaledTensor(
                    torch.empty(1, tokens, width, device=DEVICE, dtype=kind),
                    torch.empty(1, tokens, device=DEVICE) if kind != BF16 else None,
                )
                for width in (d, mlp, d + mlp)
            )
            size, mlp_in = kind.itemsize, wide[..., 3 * d :]
            cases = {
                "modulate": (partial(KERNELS.modulate, x, *mod[:2], normal), d * (2 + size)),
                "residual_modulate": (partial(KERNELS.residual_modulate, x, y, *mod, normal), d * (6 + size)),
                "gelu": (partial(KERNELS.gelu, mlp_in, hidden), mlp * (2 + size)),
                "gelu after attention": (partial(KERNELS.gelu, mlp_in, both, attn), (mlp + d) * (2 + size)),
                "quantize": (partial(KERNELS.quantize, attn, normal), d * 3),
                "rotate": (partial(KERNELS.rotate, qkv, *norm, angle.cos(), angle.sin()), d * 8),
            }
            for name in ("gelu", "gelu after attention", "quantize") if kind == BF16 else ("rotate",):
                del cases[name]
            for name, (call, moved) in cases.items():
                timed(f"{name} {tokens} {str(kind)[6:14]}", bench(call, repeat=10), moved=tokens * moved)


def attention() -> None:
    """The library's attention and ours in fp8, in the layouts of a single and a double block."""
    h, c, d = SPEC.heads, SPEC.head_dim, SPEC.hidden
    for tokens in [40] if SMALL else [1280, 4352]:
        flops = 4 * tokens**2 * d
        wide = torch.randn(1, tokens, 3 * d + SPEC.mlp, device=DEVICE, dtype=BF16)
        single = wide[..., : 3 * d].unflatten(-1, (3, h, c))
        double = torch.randn(1, tokens, 3, h, c, device=DEVICE, dtype=BF16)
        for layout, qkv in (("single", single), ("double", double)):
            q, k, v = qkv.transpose(1, 3).unbind(2)
            timed(f"attention {tokens} {layout}", bench(partial(F.scaled_dot_product_attention, q, k, v)), flops=flops)
            heads, norms = empty_heads(qkv), [torch.ones(c, device=DEVICE, dtype=BF16)] * 4
            angle = torch.randn(tokens, c // 2, device=DEVICE)
            pack = partial(KERNELS.pack_heads, qkv, norms, 0, angle.cos(), angle.sin(), heads)
            timed(f"packing heads {tokens} {layout}", bench(pack, repeat=10), moved=tokens * d * 9)
            attend = partial(KERNELS.attend_heads, heads, torch.empty_like(qkv[:, :, 0]))
            timed(f"attention {tokens} {layout} fp8", bench(attend), flops=flops)


def transformer() -> Transformer:
    """Full size, random; weights of standard deviation 1/sqrt(K), so that values keep their size."""
    with torch.device("meta"):
        model = Transformer(SPEC)
    for path, child in list(model.named_modules()):
        if is_quantized(child, path):
            model.set_submodule(path, weight(child.out_features, child.in_features))
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(path.rpartition(".")[0])
            if path.endswith("scale"):
                value = torch.rand(parameter.shape, device=DEVICE) + 0.5
            else:
                value = torch.randn(parameter.shape, device=DEVICE) / parameter.shape[-1] ** 0.5
            setattr(owner, path.rpartition(".")[2], nn.Parameter(value.to(BF16), requires_grad=False))
    return model


def steps() -> None:
    model = transformer()
    if GPU:
        note("weights GB", round(torch.cuda.memory_allocated() / 1e9, 3))
    for height, width in SIZES:
        s = height // 16 * width // 16
        img, txt = torch.randn(1, s, 64, device=DEVICE), torch.randn(1, 256, SPEC.hidden, device=DEVICE).to(BF16)
        table = torch.randn(SPEC.modulation_rows, SPEC.hidden, device=DEVICE).to(BF16) / 4
        pe = sampling.rope(sampling.positions(height, width, 256), SPEC, DEVICE)
        velocities = {}
        ways = [(f"{p.name}{beside}", p, beside) for p in PRECISIONS for beside in ("", ", beside")]
        for mode, precision, beside in (("reference", EXACT, ""), *ways):
            kernels = reference if mode == "reference" else KERNELS
            model.use(kernels, precision, side=torch.cuda.Stream() if GPU and beside else None)
            if GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            name = f"step {height} {mode}"
            if mode == "reference":
                velocities[mode] = model(img.to(BF16), txt, table, pe).float()
                continue
            size = (1, 256, s)
            arena = step_bytes(SPEC, size, BF16, precision)
            note(f"{name} arena GB", round(arena / 1e9, 4))
            scratch, text = (aligned(n) for n in (2 * max(n * k for n, k in LINEARS), SPEC.hidden * SPEC.mlp))
            region = Region(torch.empty(arena + scratch + text, dtype=torch.uint8, device=DEVICE))
            lanes = (region.take((n,), torch.uint8) for n in (scratch, text))
            graphs = GraphCache(model, DEVICE)
            plan = graphs.open(size, region, Prefetcher([], DEVICE))
            with BACKEND.using(*lanes):
                velocities[mode] = step(plan, (img, txt, table, pe), name, velocities["reference"])
            graphs.clear()


def step(plan, arguments, name: str, expected: Tensor) -> Tensor:
    """Launch, capture and replay a step; time and profile it. Returns the velocity."""
    started = time.perf_counter()
    eager = plan(*arguments).clone()
    replayed = plan(*arguments).clone()
    if GPU:
        torch.cuda.synchronize()
    note(f"{name} first, s", round(time.perf_counter() - started, 2))
    note(f"{name} replay equals eager", bool(torch.equal(eager, replayed)))
    note(f"{name} error against reference", relative(replayed, expected))
    if not GPU:
        return replayed.float()
    times = []
    for _ in range(20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        plan(*arguments)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    note(f"{name} ms", statistics.median(times), f"{statistics.median(times):.2f}  min {min(times):.2f}")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(4):
        plan(*arguments)
    stop.record()
    torch.cuda.synchronize()
    note(f"{name} four, ms", start.elapsed_time(stop))
    note(f"{name} peak reserved GB", round(torch.cuda.max_memory_reserved() / 1e9, 3))
    profile(plan, arguments, name)
    return replayed.float().cpu()


def profile(plan, arguments, name: str) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as record:
        plan(*arguments)
        torch.cuda.synchronize()
    table = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)[:16]
    RESULTS[f"{name} profile"] = [(e.key[:120], e.count, e.self_device_time_total) for e in table]
    for event in table:
        print(f"    {event.self_device_time_total / 1e3:8.3f} ms  {event.count:4d}  {event.key[:110]}")


def decoder() -> None:
    """The VAE in strips of several heights, with torch's kernels and with the fused ones."""
    spec = VaeSpec(channels=(32, 32, 64, 128), layers=1, groups=8) if SMALL else VaeSpec()
    torch.manual_seed(0)
    plain, fused = (Decoder(spec).to(DEVICE, BF16).requires_grad_(False) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fused.channels_last()
    fused.use(KERNELS)
    for height, width in SIZES:
        latents = torch.randn(1, 16, height // 8, width // 8, device=DEVICE)
        expected = torch.empty(1, height, width, 3, device=DEVICE)
        decode_picture(plain, latents, expected, height)
        for rows in (None, 64, 32, height):
            for name, module in {"plain": plain, "fused": fused}.items():
                out = torch.full_like(expected, torch.nan)
                call = partial(decode_picture, module, latents, out, rows)
                call()
                before = torch.cuda.memory_allocated() if GPU else 0
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                call()
                taken = torch.cuda.max_memory_allocated() - before if GPU else 0
                ms, off = bench(call), relative(out, expected)
                said = f"{ms:.2f} ms  {taken / 1e9:.3f} GB  error {off:.5f}"
                note(f"decoder {height} in strips of {rows or height // 8}, {name}", [ms, taken, off], said)


SECTIONS = {f.__name__: f for f in (ceilings, steps, attention, decode, decoder, rows, products)}

if __name__ == "__main__":
    torch.manual_seed(0)
    KERNELS = choose_kernels(DEVICE)
    PRECISIONS = (EXACT, Fp8(fp8_attention=True), Int8(KERNELS))
    BACKEND = TritonBackend() if GPU else ReferenceBackend()
    began = time.perf_counter()
    for section in sys.argv[1:] or SECTIONS:
        print(f"=== {section} (at {time.perf_counter() - began:.0f} s)", flush=True)
        try:
            with torch.inference_mode():
                SECTIONS[section]()
        except Exception:
            traceback.print_exc()
            RESULTS[f"{section} failed"] = traceback.format_exc()[-800:]
        if GPU:
            torch.cuda.empty_cache()
        Path(os.environ.get("OUT", "."), "speed.json").write_text(json.dumps(RESULTS, indent=1))
    print(f"=== done in {time.perf_counter() - began:.0f} s")
