"""Check and measure the kernels of `int8` at full size: `python tools/benchmarks/int8_kernels.py [section ...]`.

Beside each stands what does the same work in fp8. Inputs are random and in rotation, more than a cache holds; times are
medians of replays of a CUDA graph, in microseconds. Prints tables and writes `int8.json` into $OUT (default: here). The
section `others` runs what RTX 30 and 40 would get (see other_cards.py). Needs a CUDA device; `others` needs CuPy.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import measure_speed
import torch
from torch import Tensor

from vortex_core.kernels import ScaledTensor, fused, int8_product, launch, reference
from vortex_core.kernels.scaled_tensor import FP8

BF16, INT8 = torch.bfloat16, torch.int8
D, MLP = 3072, 12288
CACHE = 120_000_000  # bytes, twice an H200's L2
PRODUCTS = [  # rows, K, N: of a single block at 512 and 1024, and of a double block's image and text
    *((m, k, n) for m in (1280, 4352) for k, n in ((D, D * 3 + MLP), (D + MLP, D))),
    *((m, k, n) for m in (256, 1024, 4096) for k, n in ((D, 3 * D), (D, D), (D, MLP), (MLP, D))),
    *((m, k, n) for m in (1280, 4352) for k, n in ((D, MLP), (MLP, D))),
]
DECODES = [(MLP, D), (D, MLP), (D, D), (D * 3 + MLP, D), (D, D + MLP)]
TOKENS = [1280, 4352]
RESULTS: dict[str, dict[str, float]] = {}


class Product(NamedTuple):
    """Arguments of `multiply_int8`."""

    x: Tensor
    x_scale: Tensor
    weight: Tensor
    row_scale: Tensor
    bias: Tensor
    out: Tensor


def note(key: str, **values: float) -> None:
    RESULTS.setdefault(key, {}).update(values)
    print(f"{key:28s}", "  ".join(f"{name} {value:8.2f}" for name, value in values.items()), flush=True)


def bench(calls: list[Callable[[], object]], **how: int) -> float:
    """Median microseconds of one call; see `measure_speed.bench`."""
    return 1e3 * measure_speed.bench(*calls, **how)


def random_product(m: int, k: int, n: int) -> Product:
    x, weight = (torch.randint(-127, 128, shape, dtype=INT8, device="cuda") for shape in ((m, k), (n, k)))
    scales = torch.rand(m, device="cuda") + 0.5, (torch.rand(n, device="cuda") + 0.5) * 1e-3
    bias, out = torch.randn(n, device="cuda").to(BF16), torch.full((m, n), torch.nan, device="cuda", dtype=BF16)
    return Product(x, scales[0], weight, scales[1], bias, out)


def random_weight(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, absmax and the scales of rows for int8."""
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    absmax, scale = (torch.rand(n, k // 64, device="cuda") + 0.5) / k**0.5, torch.empty(n, device="cuda")
    fused.row_scales(packed, absmax, scale, INT8)
    return packed, absmax, scale


def operand(tokens: int, width: int, dtype: torch.dtype) -> ScaledTensor:
    return ScaledTensor(
        torch.empty(1, tokens, width, device="cuda", dtype=dtype), torch.empty(1, tokens, device="cuda")
    )


# --- right or wrong -----------------------------------------------------------------------------------------------


def check_product(m: int, k: int, n: int) -> bool:
    arguments = random_product(m, k, n)
    fused.multiply_int8(*arguments)
    torch.cuda.synchronize()
    found, expected = arguments.out.clone(), torch.empty_like(arguments.out, dtype=torch.float32)
    reference.multiply_int8(*arguments[:-1], expected)
    return bool(((found.float() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all())  # NaN is not


def check_decode(n: int, k: int) -> bool:
    packed, absmax, _ = random_weight(n, k)
    found = []
    for kernels in (fused, reference):
        scale, out = torch.empty(n, device="cuda"), torch.full((n, k), 85, dtype=INT8, device="cuda")
        kernels.row_scales(packed, absmax, scale, INT8)
        kernels.dequantize(packed, absmax, out, scale)
        torch.cuda.synchronize()
        found.append((scale, out))
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def check_rows(tokens: int) -> bool:
    x, y, wide = (torch.randn(1, tokens, width, device="cuda").to(BF16) for width in (D, D, MLP))
    gate, shift, scale = torch.randn(3, D, device="cuda").to(BF16)
    found = []
    for kernels in (fused, reference):
        stream = x.clone()
        outs = [operand(tokens, width, INT8) for width in (D, D, D, MLP, D + MLP)]
        kernels.modulate(x, shift, scale, outs[0])
        kernels.residual_modulate(stream, y, gate, shift, scale, outs[1])
        kernels.quantize(x, outs[2])
        kernels.gelu(wide, outs[3])
        kernels.gelu(wide, outs[4], x)
        torch.cuda.synchronize()
        found.append(outs)
    same = True
    for ours, theirs in zip(*found, strict=True):
        differ = (ours.values.int() - theirs.values.int()).abs()
        near = ((ours.scale - theirs.scale).abs() <= 1e-2 * theirs.scale).all()  # a tie in 16 bits can move the largest
        same &= bool(near) and int(differ.max()) <= 2 and float((differ > 0).float().mean()) < 0.02
    return same


def check() -> None:
    """Against the references: the shapes that have a tile or a path of their own."""
    shapes = [(1, D, 3 * D), (43, 1152, 320), (517, D, D), (4352, D + MLP, D), (1280, D, MLP)]
    wrong = [shape for shape in shapes if not check_product(*shape)]
    wrong += [shape for shape in ((130, 320), (1001, D), (70, D + MLP)) if not check_decode(*shape)]
    wrong += [] if check_rows(37) else ["rows"]
    note("check", wrong=len(wrong))
    assert not wrong, wrong


def others() -> None:
    """The kernels of 8.0, 8.6 and 8.9, from their PTX."""
    from other_cards import running

    for capability in (80, 86, 89):
        with running(capability):
            good = {
                "product": check_product(517, 1152, 320) and check_product(1280, D, MLP),
                "decode": check_decode(130, 320) and check_decode(70, D + MLP),
                "rows": check_rows(37),
            }
        note(f"sm_{capability}", **{name: float(value) for name, value in good.items()})
        assert all(good.values()), (capability, good)


# --- how fast -----------------------------------------------------------------------------------------------------


@contextmanager
def plain() -> Iterator[None]:
    """Inside, the product is what a card without a copy engine gets."""
    before = int8_product.card
    int8_product.card = lambda device: before(device)._replace(copies=False)
    try:
        yield
    finally:
        int8_product.card = before


def products() -> None:
    for m, k, n in PRODUCTS:
        size = m * k + n * k + 2 * m * n
        sets = [random_product(m, k, n) for _ in range(max(2, -(-CACHE // size)))]
        ours = bench([partial(fused.multiply_int8, *each) for each in sets])
        with plain():
            simple = bench([partial(fused.multiply_int8, *each) for each in sets])
        eight = [(each.x.to(FP8), each.weight.to(FP8).t(), each) for each in sets]
        fp8 = bench([partial(fp8_product, *each) for each in eight])
        sixteen = [(each.x.to(BF16), each.weight.to(BF16).t(), each) for each in sets]
        bf16 = bench([partial(torch.addmm, each.bias, x, w, out=each.out) for x, w, each in sixteen])
        note(f"{m} x {k} x {n}", int8=ours, plain=simple, fp8=fp8, bf16=bf16, tops=2e-6 * m * k * n / ours)


def fp8_product(x: Tensor, weight: Tensor, each: Product) -> None:
    torch._scaled_mm(
        x,
        weight,
        each.x_scale[:, None],
        each.row_scale[None, :],
        each.bias,
        out_dtype=BF16,
        use_fast_accum=True,
        out=each.out,
    )


def decodes() -> None:
    for n, k in DECODES:
        weights = [random_weight(n, k) for _ in range(max(3, -(-2 * CACHE // (n * k))))]
        times = {}
        for name, dtype in (("int8", INT8), ("fp8", FP8), ("bf16", BF16)):
            out = torch.empty(n, k, device="cuda", dtype=dtype)
            times[name] = bench(
                [partial(fused.dequantize, p, a, out, None if dtype == BF16 else s) for p, a, s in weights]
            )
        times["row_scales"] = bench([partial(fused.row_scales, p, a, s, INT8) for p, a, s in weights])
        note(f"decode {n} x {k}", **times)


def rows() -> None:
    for tokens in TOKENS:
        x, y, wide = (torch.randn(1, tokens, width, device="cuda").to(BF16) for width in (D, D, MLP))
        gate, shift, scale = torch.randn(3, D, device="cuda").to(BF16) / 10
        for name, dtype in (("int8", INT8), ("fp8", FP8)):
            narrow, middle, broad = (operand(tokens, width, dtype) for width in (D, MLP, D + MLP))
            cases = {
                "modulate": partial(fused.modulate, x, shift, scale, narrow),
                "residual": partial(fused.residual_modulate, x, y, gate, shift, scale, narrow),
                "gelu": partial(fused.gelu, wide, middle),
                "after": partial(fused.gelu, wide, broad, x),
                "quantize": partial(fused.quantize, x, narrow),
            }
            note(f"rows {tokens} {name}", **{case: bench([call], repeat=10) for case, call in cases.items()})


def block(tokens: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """The launches of a single block but attention."""
    first, second = random_weight(3 * D + MLP, D), random_weight(D, D + MLP)
    x, y = torch.randn(2, 1, tokens, D, device="cuda").to(BF16)
    gate, shift, scale = torch.randn(3, D, device="cuda").to(BF16) / 10
    narrow, broad = operand(tokens, D, dtype), operand(tokens, D + MLP, dtype)
    wide, bias = (
        torch.empty(1, tokens, 3 * D + MLP, device="cuda", dtype=BF16),
        torch.randn(3 * D + MLP, device="cuda").to(BF16),
    )
    scratch = torch.empty(3 * D + MLP, D, device="cuda", dtype=dtype)

    def linear(weight: tuple[Tensor, Tensor, Tensor], operand: ScaledTensor, out: Tensor) -> None:
        n = len(weight[0])
        decoded = scratch.flatten()[: n * 2 * weight[0].shape[1]].view(n, -1)
        fused.dequantize(*weight[:2], decoded, weight[2])
        values, each = operand.values[0], operand.scale[0]
        if dtype == INT8:
            fused.multiply_int8(values, each, decoded, weight[2], bias[:n], out)
        else:
            fp8_product(values, decoded.t(), Product(values, each, decoded, weight[2], bias[:n], out))

    return [
        lambda: fused.residual_modulate(x, y, gate, shift, scale, narrow),
        lambda: linear(first, narrow, wide[0]),
        lambda: fused.gelu(wide[..., 3 * D :], broad, x),
        lambda: linear(second, broad, y[0]),
    ]


def blocks() -> None:
    """Single blocks without attention, as they follow each other; with and without kernels that are launched early."""
    for tokens in TOKENS:
        times = {}
        for name, dtype, early in (("int8", INT8, True), ("in turn", INT8, False), ("fp8", FP8, True)):
            before = launch.card
            if not early:
                launch.card = lambda device, before=before: before(device)._replace(early=False)
            calls = [call for _ in range(4) for call in block(tokens, dtype)]
            times[name] = 4 * bench(calls)
            launch.card = before
        note(f"block {tokens}", **times)


SECTIONS = {section.__name__: section for section in (check, others, products, decodes, rows, blocks)}

if __name__ == "__main__":
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    with torch.inference_mode():
        for section in sys.argv[1:] or SECTIONS:
            print(f"=== {section}", flush=True)
            SECTIONS[section]()
            torch.cuda.empty_cache()
    Path(os.environ.get("OUT", "."), "int8.json").write_text(json.dumps(RESULTS, indent=1))
