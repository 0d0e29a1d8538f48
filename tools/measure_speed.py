"""Measure kernels, products, steps and decodes at full size with random weights. `python tools/measure_speed.py [section ...]`.

Prints tables as it goes and writes `speed.json` into $OUT (default: the current folder). Needs a CUDA device.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vortex_core import nf4, sampling
from vortex_core.checkpoint.materialize import is_quantized
from vortex_core.kernels import Heads, Operand, choose_kernels, reference
from vortex_core.kernels.operand import FP8, head_shapes
from vortex_core.linear import NF4Linear, TritonBackend, product
from vortex_core.plans import Plans, plan_bytes
from vortex_core.spec import FluxSpec, VaeSpec
from vortex_core.transformer import Transformer
from vortex_core.vae import Decoder

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
    linear = NF4Linear(nf4.NF4Weight(packed, absmax), torch.randn(n, device=DEVICE, dtype=BF16) / 10, BACKEND)
    linear.prepare_fp8()
    return linear


def quantized(m: int, k: int) -> Operand:
    x = Operand(torch.empty(1, m, k, device=DEVICE, dtype=FP8), torch.empty(1, m, device=DEVICE))
    reference.quantize(torch.randn(1, m, k, device=DEVICE), x)
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
    """Variants of the decode kernel; weights in rotation, so that packed values come from memory."""
    from vortex_core.kernels import decode as module

    for n, k in LINEARS:
        weights = [weight(n, k) for _ in range(2 if SMALL else max(3, 160_000_000 // (n * k)))]
        for kind in (BF16, FP8):
            out = torch.empty(n, k, device=DEVICE, dtype=kind)
            moved = n * k * (0.5625 + kind.itemsize)
            for words, warps in ((256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8)):
                module.WORDS, module.WARPS = words, warps
                calls = [
                    lambda w=w: module.decode(w.packed, w.absmax, out, w.row_scale if kind == FP8 else None)
                    for w in weights
                ]
                ms = bench(*calls)
                name = f"decode {n}x{k} {str(kind)[6:14]} words {words} warps {warps}"
                note(name, ms, f"{1e3 * ms:7.1f} us  {moved / max(ms, 1e-9) / 1e9:5.2f} TB/s")
    module.WORDS, module.WARPS = 512, 4


def products() -> None:
    """Decode and product of every linear: alone, one after the other, and the decode of the next beside the product."""
    for n, k in LINEARS:
        weights = [weight(n, k) for _ in range(2 if SMALL else 4)]
        buffers = [torch.empty(n, k, device=DEVICE, dtype=BF16) for _ in range(2)]
        for m in TOKENS:
            out = torch.empty(m, n, device=DEVICE, dtype=BF16)
            for kind in (BF16, FP8):
                x = quantized(m, k) if kind == FP8 else Operand(torch.randn(1, m, k, device=DEVICE, dtype=BF16))
                decoded = [b.view(-1).view(kind)[: n * k].view(n, k) for b in buffers]

                def fill(w, target, kind=kind):
                    KERNELS.decode(w.packed, w.absmax, target, w.row_scale if kind == FP8 else None)

                def multiply(w, source, x=x, out=out):
                    scale = None if x.scale is None else x.scale[0]
                    product(x.values[0], scale, source, w.row_scale, w.bias, out)

                def both(w, target=decoded[0], fill=fill, multiply=multiply):
                    fill(w, target)
                    multiply(w, target)

                for w, target in zip(weights, decoded, strict=False):
                    fill(w, target)
                name = f"linear {m}x{k}x{n} {str(kind)[6:14]}"
                alone = bench(*[lambda w=w: multiply(w, decoded[0]) for w in weights])
                serial = bench(*[lambda w=w: both(w) for w in weights])
                beside = bench(lambda: overlapped(weights, decoded, fill, multiply)) / len(weights)
                rate = 2 * m * n * k / max(alone, 1e-9) / 1e9
                note(
                    name, [alone, serial, beside],
                    f"product {1e3 * alone:7.1f} us ({rate:5.0f} T)  with decode {1e3 * serial:7.1f}"
                    f"  beside {1e3 * beside:7.1f}",
                )  # fmt: skip
        if not SMALL:
            chunks(n, k, weights)


def overlapped(weights, decoded, fill, multiply) -> None:
    """Each product runs beside the decode of the next weight, into the other of two buffers."""
    if not GPU:
        return
    main = torch.cuda.current_stream()
    side = SIDE
    side.wait_stream(main)
    with torch.cuda.stream(side):
        fill(weights[0], decoded[0])
    for i, w in enumerate(weights):
        main.wait_stream(side)
        if i + 1 < len(weights):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                fill(weights[i + 1], decoded[(i + 1) % 2])
        multiply(w, decoded[i % 2])


def chunks(n: int, k: int, weights: list[NF4Linear]) -> None:
    """fp8 in chunks of rows that stay in the L2 cache."""
    for m in (1280, 4352):
        x, out = quantized(m, k), torch.empty(m, n, device=DEVICE, dtype=BF16)
        for count in (2, 3):
            rows = n // count
            if n % (count * 16):
                continue
            workspace = torch.empty(rows, k, device=DEVICE, dtype=FP8)

            def run(w, rows=rows, workspace=workspace, x=x, out=out, count=count):
                for i in range(count):
                    part = slice(i * rows, (i + 1) * rows)
                    KERNELS.decode(w.packed[part], w.absmax[part], workspace, w.row_scale[part])
                    target = out[:, part]
                    torch._scaled_mm(
                        x.values[0], workspace.t(), x.scale[0][:, None], w.row_scale[part][None], w.bias[part],
                        out_dtype=BF16, use_fast_accum=True, out=target,
                    )  # fmt: skip

            try:
                ms = bench(*[lambda w=w: run(w) for w in weights])
                note(f"linear {m}x{k}x{n} fp8 in {count} chunks", ms, f"{1e3 * ms:7.1f} us")
            except Exception as error:
                note(f"linear {m}x{k}x{n} fp8 in {count} chunks", str(error)[:100])


def rows() -> None:
    """The element-wise kernels, by number of warps."""
    from vortex_core.kernels import rotary
    from vortex_core.kernels import rows as module

    d, mlp = SPEC.hidden, SPEC.mlp
    real = {name: getattr(module, name) for name in ("_modulate", "_gelu")} | {"_rotate": rotary._rotate}

    def with_warps(kernel, warps):
        class Launch:
            def __getitem__(self, grid):
                return lambda *a, **o: kernel[grid](*a, **{**o, "num_warps": warps})

        return Launch()

    for tokens in [8] if SMALL else [1280, 4352]:
        x, y = torch.randn(2, 1, tokens, d, device=DEVICE).to(BF16)
        wide = torch.randn(1, tokens, 3 * d + mlp, device=DEVICE).to(BF16)
        attn = torch.randn(1, tokens, d, device=DEVICE).to(BF16)
        mod = torch.randn(3, d, device=DEVICE).to(BF16) / 10
        norm = torch.rand(2, SPEC.head_dim, device=DEVICE).to(BF16) + 0.5
        angle = torch.randn(tokens, SPEC.head_dim // 2, device=DEVICE)
        cos, sin = angle.cos(), angle.sin()
        qkv = wide[..., : 3 * d].unflatten(-1, (3, SPEC.heads, SPEC.head_dim))
        for kind in (FP8, BF16):

            def operand(width, kind=kind, tokens=tokens):
                scale = torch.empty(1, tokens, device=DEVICE) if kind == FP8 else None
                return Operand(torch.empty(1, tokens, width, device=DEVICE, dtype=kind), scale)

            normal, active = operand(d), operand(d + mlp)
            mlp_only = operand(mlp)
            in_place = Operand(wide[..., 2 * d :])
            size = kind.itemsize
            cases = {
                "modulate": (lambda: module.modulate(x, *mod[:2], normal), tokens * d * (2 + size), "_modulate"),
                "residual_modulate": (
                    lambda: module.residual_modulate(x, y, *mod, normal), tokens * d * (6 + size), "_modulate"),
                "gelu": (
                    lambda: module.gelu(wide[..., 3 * d :], mlp_only), tokens * mlp * (2 + size), "_gelu"),
                "gelu after attention": (
                    lambda: module.gelu(wide[..., 3 * d :], active if kind == FP8 else in_place, attn),
                    tokens * (mlp + d) * (2 + size), "_gelu"),
            }  # fmt: skip
            if kind == FP8:
                cases["quantize"] = (lambda: module.quantize(attn, normal), tokens * d * 3, "_gelu")
            else:
                cases["rotate"] = (lambda: rotary.rotate(qkv, *norm, cos, sin), tokens * d * 8, "_rotate")
            for name, (call, moved, kernel) in cases.items():
                home = rotary if kernel == "_rotate" else module
                for warps in (4, 8, 16):
                    setattr(home, kernel, with_warps(real[kernel], warps))
                    ms = bench(call, repeat=10)
                    note(
                        f"{name} {tokens} {str(kind)[6:14]} warps {warps}", ms,
                        f"{1e3 * ms:7.1f} us  {moved / max(ms, 1e-9) / 1e9:5.2f} TB/s",
                    )  # fmt: skip
                    setattr(home, kernel, real[kernel])


def attention() -> None:
    """The library's attention in the layouts of a single and a double block, and Vortex's own in fp8."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vortex_core.kernels import attention as ours

    h, c, d = SPEC.heads, SPEC.head_dim, SPEC.hidden
    for tokens in [40] if SMALL else [1280, 4352]:
        flops = 4 * tokens**2 * d
        wide = torch.randn(1, tokens, 3 * d + SPEC.mlp, device=DEVICE, dtype=BF16)
        layouts = {
            "single": wide[..., : 3 * d].unflatten(-1, (3, h, c)),
            "double": torch.randn(1, tokens, 3, h, c, device=DEVICE, dtype=BF16),
        }
        for layout, qkv in layouts.items():
            q, k, v = qkv.transpose(1, 3).unbind(2)
            for name in ("default", "CUDNN_ATTENTION", "FLASH_ATTENTION"):
                try:

                    def run(q=q, k=k, v=v):
                        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

                    if name == "default":
                        ms = bench(run, repeat=5)
                    else:
                        with sdpa_kernel(getattr(SDPBackend, name)):
                            ms = bench(run, repeat=5)
                    text = f"{1e3 * ms:7.1f} us  {flops / max(ms, 1e-9) / 1e9:5.0f} T"
                    note(f"attention {tokens} {layout} {name}", ms, text)
                except Exception as error:
                    note(f"attention {tokens} {layout} {name}", str(error)[:100])
        qkv = layouts["double"]
        norm = torch.rand(2, c, device=DEVICE).to(BF16) + 0.5
        angle = torch.randn(tokens, c // 2, device=DEVICE)
        shapes = head_shapes(1, h, tokens, c)
        heads = Heads(*(
            torch.empty(shape, device=DEVICE, dtype=FP8 if i < 3 else torch.float32) for i, shape in enumerate(shapes)
        ))  # fmt: skip
        out = torch.full((1, tokens, d), torch.nan, device=DEVICE, dtype=BF16)
        norms = (*norm, *norm)
        cos, sin = angle.cos(), angle.sin()
        for warps in (16, 8):
            ours.QUANTIZE_WARPS = warps
            ms = bench(lambda: ours.quantize_heads(qkv, norms, 256, cos, sin, heads), repeat=5)
            text = f"{1e3 * ms:7.1f} us  {tokens * d * 9 / max(ms, 1e-9) / 1e9:5.2f} TB/s"
            note(f"quantize_heads {tokens} warps {warps}", ms, text)
        exact = qkv.clone()
        reference.rotate(exact, *norm, cos, sin)
        q, k, v = exact.double().transpose(1, 3).unbind(2)
        if tokens > 2000:
            q, k, v = q[:, :2], k[:, :2], v[:, :2]
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        try:
            out.fill_(torch.nan)
            ms = bench(lambda: ours.attention(heads, out), repeat=5)
            error = relative(out[..., : expected.shape[-1]].double(), expected)
            text = f"{1e3 * ms:7.1f} us  {flops / max(ms, 1e-9) / 1e9:5.0f} T  error {error:.4f}"
            note(f"attention {tokens} fp8, this card's", [ms, error], text)
        except Exception:
            traceback.print_exc()
        for block, warps, stages in ((128, 8, 3), (64, 4, 3)):
            name = f"attention {tokens} fp8 block {block} warps {warps} stages {stages}"
            ours.BLOCK, ours.WARPS, ours.STAGES = block, warps, stages
            try:
                out.fill_(torch.nan)
                ms = bench(lambda: ours.portable(heads, out), repeat=5)
                error = relative(out[..., : expected.shape[-1]].double(), expected)
                note(name, [ms, error], f"{1e3 * ms:7.1f} us  {flops / max(ms, 1e-9) / 1e9:5.0f} T  error {error:.4f}")
            except Exception as error:
                note(name, str(error)[:200])
        ours.BLOCK, ours.WARPS, ours.STAGES = 64, 4, 3


def transformer() -> Transformer:
    """Full size, random; weights of standard deviation 1/sqrt(K), so that values neither fade nor explode."""
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
    BACKEND.reserve(max(n * k for n, k in LINEARS), BF16)
    if GPU:
        note("weights GB", round(torch.cuda.memory_allocated() / 1e9, 3))
    for height, width in SIZES:
        s = height // 16 * width // 16
        img, txt = torch.randn(1, s, 64, device=DEVICE), torch.randn(1, 256, SPEC.hidden, device=DEVICE).to(BF16)
        table = torch.randn(SPEC.modulation_rows, SPEC.hidden, device=DEVICE).to(BF16) / 4
        pe = sampling.rope(sampling.positions(height, width, 256), SPEC, DEVICE)
        velocities = {}
        for mode in ("reference", "exact", "exact, beside", "fast", "fast, beside", "fast, 16-bit attention"):
            fast = mode.startswith("fast")
            kernels = reference if mode == "reference" else KERNELS
            model.use(kernels, fast=fast, beside=GPU and mode.endswith("beside"))
            if GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            name = f"step {height} {mode}"
            if mode == "reference":
                velocities[mode] = model(img.to(BF16), txt, table, pe).float()
                continue
            started = time.perf_counter()
            plan = Plans(model).plan((1, 256, s), pe)
            if mode.endswith("attention"):
                plan.step.heads = None
            eager = plan(img, txt, table).clone()
            replayed = plan(img, txt, table).clone()
            if GPU:
                torch.cuda.synchronize()
            note(f"{name} first, s", round(time.perf_counter() - started, 2))
            note(f"{name} replay equals eager", bool(torch.equal(eager, replayed)))
            velocities[mode] = replayed.float()
            note(f"{name} error against reference", relative(replayed, velocities["reference"]))
            arena = plan_bytes(SPEC, (1, 256, s), BF16, fast=fast)
            note(f"{name} arena GB", round(arena / 1e9, 4))
            if not GPU:
                continue
            times = []
            for _ in range(20):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                plan(img, txt, table)
                stop.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(stop))
            note(f"{name} ms", statistics.median(times), f"{statistics.median(times):.2f}  min {min(times):.2f}")
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                plan(img, txt, table)
            stop.record()
            torch.cuda.synchronize()
            note(f"{name} four, ms", start.elapsed_time(stop))
            note(f"{name} peak reserved GB", round(torch.cuda.max_memory_reserved() / 1e9, 3))
            profile(plan, (img, txt, table), name)
            del plan


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


def vae() -> None:
    """Ways to decode: eager, channels last, the fused norm, each as a graph; and compiled."""
    spec = VaeSpec(channels=(32, 32, 64, 128), layers=1, groups=8) if SMALL else VaeSpec()
    torch.manual_seed(0)
    decoder = Decoder(spec).to(DEVICE, BF16).requires_grad_(False)
    for height, width in SIZES:
        latents = torch.randn(1, 16, height // 8, width // 8, device=DEVICE, dtype=BF16)
        expected = decoder(latents).float()
        for layout in ("contiguous", "channels_last"):
            if layout == "channels_last":
                decoder = decoder.to(memory_format=torch.channels_last)
            for norm in ("torch", "fused"):
                if norm == "fused" and layout == "contiguous":
                    continue
                name = f"vae {height} {layout} {norm}"
                try:
                    run = decoder if norm == "torch" else lambda z: fused_decoder(decoder, z)
                    x = latents.contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))
                    if GPU:
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                        base = torch.cuda.memory_allocated()
                    error = relative(run(x), expected)
                    peak = (torch.cuda.max_memory_allocated() - base) / 1e9 if GPU else 0
                    ms = bench(lambda: run(x))
                    note(name, [ms, error, peak], f"{ms:8.2f} ms  error {error:.4f}  activations {peak:.2f} GB")
                except Exception as error:
                    traceback.print_exc()
                    note(name, str(error)[:200])
        torch.backends.cudnn.benchmark = True
        try:
            x = latents.contiguous(memory_format=torch.channels_last)
            ms = bench(lambda: fused_decoder(decoder, x))
            note(f"vae {height} channels_last fused, cudnn.benchmark", ms, f"{ms:8.2f} ms")
        finally:
            torch.backends.cudnn.benchmark = False
        decoder = decoder.to(memory_format=torch.contiguous_format)


def fused_decoder(decoder: Decoder, latents: Tensor) -> Tensor:
    """The decoder with the fused group norm and SiLU."""

    def norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
        mean, variance = reference.join_moments(KERNELS.group_moments(x, module.num_groups))
        size = module.num_channels // module.num_groups
        scale = module.weight.float() * (variance + module.eps).rsqrt().repeat_interleave(size)
        shift = module.bias.float() - mean.repeat_interleave(size) * scale
        return KERNELS.norm_silu(x, scale, shift, torch.empty_like(x))

    def resnet(block, x: Tensor) -> Tensor:
        h = block.conv1(norm(block.norm1, x))
        h = block.conv2(norm(block.norm2, h))
        return h.add_(block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x)

    x = decoder.conv_in(latents / decoder.scale + decoder.shift)
    x = resnet(decoder.mid.block_1, x)
    x = decoder.mid.attn_1(x).contiguous(memory_format=torch.channels_last)
    x = resnet(decoder.mid.block_2, x)
    for level in reversed(decoder.up):
        for block in level.block:
            x = resnet(block, x)
        if hasattr(level, "upsample"):
            x = level.upsample(x)
    return decoder.conv_out(norm(decoder.norm_out, x))


SECTIONS = {f.__name__: f for f in (ceilings, steps, attention, decode, vae, rows, products)}

if __name__ == "__main__":
    torch.manual_seed(0)
    KERNELS = choose_kernels(DEVICE)
    BACKEND = TritonBackend(DEVICE) if GPU else __import__("vortex_core.linear").linear.ReferenceBackend()
    SIDE = torch.cuda.Stream() if GPU else None
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
