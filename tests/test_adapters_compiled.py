"""LoRAs without Triton: the kernels in CUDA C in every pair of types, and what backends make of one update."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from kernel_parts import DEVICE, GPU, HALF
from test_adapters import made
from torch import Tensor

from vortex_core import nf4
from vortex_core.flux1.spec import ModelSpec
from vortex_core.kernels import ADD_BYTES, Kernels, compiled, rotation
from vortex_core.kernels.scaled_tensor import FP8, FP8_MAX
from vortex_core.quant.backends import _KINDS, BACKENDS, Backend, backend_declined
from vortex_core.runtime.model import Model

pytestmark = pytest.mark.usefixtures("seeded")
FP8_CARD = not GPU or torch.cuda.get_device_capability() >= (8, 9)
# (rows, columns, ranks): half a tile of columns, a tile of rows that is not full, many ranks, several tiles of both
SHAPES = [(64, 64, 16), (75, 192, 16), (320, 384, 48), (130, 128, 192)]


@pytest.fixture
def cuda_c(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels in CUDA C, on a card or on the CPU."""
    cuda_on_cpu.use(monkeypatch)
    return compiled


def guarded(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for a result, poisoned, and the whole that it lies in, with rows before and after it."""
    whole = torch.full((n + 2, k), 0x7F, device=DEVICE, dtype=torch.uint8).repeat_interleave(dtype.itemsize, 1)
    return whole.view(dtype)[1 : n + 1], whole


def assert_guarded(whole: Tensor) -> None:
    assert set(whole[[0, -1]].unique().tolist()) == {0x7F}


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_once(cuda_c: Kernels, n: int, k: int, ranks: int, dtype: torch.dtype) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float16)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    out, whole = guarded(n, k, dtype)
    cuda_c.dequantize(weight.packed, weight.absmax, out, None, adapter)
    assert_guarded(whole)
    off, near = (out.double() - expected).abs(), expected.abs()
    # half a step of the type, and factors that are rounded with their strength
    assert bool((off <= near * torch.finfo(dtype).eps / 2 + update.abs().max() * 2**-11).all())


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
def test_int8(cuda_c: Kernels, n: int, k: int, ranks: int) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float16)
    (out, whole), scale = guarded(n, k, torch.int8), torch.full((n,), torch.nan, device=DEVICE)
    cuda_c.row_scales(weight.packed, weight.absmax, scale, torch.int8, adapter)
    cuda_c.dequantize(weight.packed, weight.absmax, out, scale, adapter)
    assert_guarded(whole)
    expected = rotation.rotated((nf4.dequantize(weight, torch.float32).double() + update).float()).double()
    torch.testing.assert_close(scale.double(), expected.abs().amax(1) / 127, rtol=2e-3, atol=0)
    off = out.double() - expected / scale.double()[:, None]
    assert off.abs().max() < 0.75
    assert off.square().mean() < 1.02 / 12
    assert set(out.abs().amax(1).tolist()) == {127}


@pytest.mark.skipif(not FP8_CARD, reason="NOT RUN, fp8: this card has none")
@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
def test_fp8(cuda_c: Kernels, n: int, k: int, ranks: int) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float16)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    (out, whole), scale = guarded(n, k, FP8), torch.full((n,), torch.nan, device=DEVICE)
    cuda_c.row_scales(weight.packed, weight.absmax, scale, FP8, adapter)
    cuda_c.dequantize(weight.packed, weight.absmax, out, scale, adapter)
    assert_guarded(whole)
    torch.testing.assert_close(scale.double(), expected.abs().amax(1) / FP8_MAX, rtol=1e-3, atol=0)
    wanted = (expected / scale.double()[:, None]).float().clamp(-FP8_MAX, FP8_MAX)
    off, step = (out.float() - wanted).abs(), wanted.abs().clamp_min(2.0**-6) * 2.0**-4  # half a step, at least
    assert bool((off <= step + FP8_MAX * 2.0**-10).all())
    assert (out.view(torch.uint8) == wanted.to(FP8).view(torch.uint8)).float().mean() > 0.98


def test_without_strength_there_are_the_bits_of_before(cuda_c: Kernels) -> None:
    weight, adapter, _ = made(192, 384, 16, torch.float16)
    still = adapter._replace(scale=torch.zeros_like(adapter.scale))
    for dtype in (torch.float32, HALF):
        out, expected = (guarded(192, 384, dtype)[0] for _ in range(2))
        cuda_c.dequantize(weight.packed, weight.absmax, out, None, still)
        cuda_c.dequantize(weight.packed, weight.absmax, expected)
        assert torch.equal(out, expected)


def test_nan_in_a_factor_shows_in_its_rows_scales_only(cuda_c: Kernels) -> None:
    weight, adapter, _ = made(192, 384, 16, torch.float16)
    adapter.up[70, 3] = torch.nan
    scale = torch.empty(192, device=DEVICE)
    for dtype in (torch.int8, FP8):
        cuda_c.row_scales(weight.packed, weight.absmax, scale, dtype, adapter)
        assert scale.isnan().nonzero().flatten().tolist() == [70]


# Backends.


def backends() -> list[Backend]:
    """Those that run here; on the CPU Triton interpreted, and CUDA C by a C++ compiler."""
    if GPU:
        return [_KINDS[name]() for name in BACKENDS if backend_declined(name, DEVICE) is None]
    return [_KINDS[name]() for name in BACKENDS if name != "bitsandbytes" or backend_declined(name, DEVICE) is None]


@pytest.mark.usefixtures("cuda_c")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_backends_agree(dtype: torch.dtype) -> None:
    """To one rounding with an own kernel, else to two, and those of the factors."""
    pytest.importorskip("triton", reason="NOT RUN, backends beside each other: Triton is not installed here")
    weight, adapter, update = made(192, 384, 48, torch.float32 if dtype == torch.float32 else torch.float16)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    found = {b.name: b.dequantize(weight.packed, weight.absmax, dtype, adapter=adapter) for b in backends()}
    assert {"triton", "nvrtc", "reference"} <= set(found) or GPU
    eps = torch.finfo(dtype).eps
    for name, out in found.items():
        off = float((out.double() - expected).norm() / expected.norm())
        print(f"\n{name}: {off / eps:.2f} eps", end="")
        if dtype == torch.float32:
            assert off < 2e-6
        else:
            assert off < (0.25 if _KINDS[name].eight else 0.4) * eps


@pytest.mark.usefixtures("cuda_c")
@pytest.mark.parametrize("operand", [torch.int8, FP8])
def test_backends_agree_in_8_bits(operand: torch.dtype) -> None:
    """Row scales to a thousandth, values to a step here and there: Triton's factors are rounded with their strength."""
    pytest.importorskip("triton", reason="NOT RUN, backends beside each other: Triton is not installed here")
    if operand == FP8 and not (GPU and FP8_CARD):
        pytest.skip("NOT RUN, fp8: Triton's interpreter drops a carry")
    weight, adapter, _ = made(192, 384, 48, torch.float16)
    found = []
    for backend in (b for b in backends() if b.eight):
        scale = torch.full((192,), torch.nan, device=DEVICE)
        backend.row_scales(weight.packed, weight.absmax, scale, operand, adapter)
        out = backend.dequantize(weight.packed, weight.absmax, operand, scale, adapter=adapter)
        found.append((scale, out.float()))
    assert len(found) == 2 or GPU
    for scale, out in found[1:]:
        torch.testing.assert_close(scale, found[0][0], rtol=1e-3, atol=0)
        assert (out - found[0][1]).abs().max() <= (1 if operand == torch.int8 else 32)
        assert (out != found[0][1]).float().mean() < 0.05


def test_what_backends_take_to_add_an_update_is_planned() -> None:
    plans = {}
    for name in ("nvrtc", "bitsandbytes", "reference"):
        model = Model(ModelSpec(), torch.bfloat16, _KINDS[name](), compiled)
        asked = model.requirements(512, 512, 1)
        plans[name] = asked.steps[0].library, asked.library
        assert model.allocates == _KINDS[name].working_bytes
    for name in ("bitsandbytes", "reference"):
        assert plans[name][0] >= plans["nvrtc"][0] + ADD_BYTES
    assert plans["bitsandbytes"] <= plans["reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("operand", [None, torch.int8, FP8])
def test_a_captured_decode_follows_strengths_and_allocates_what_it_says(name: str, operand: torch.dtype | None) -> None:
    """In a graph nothing may wait for the card. Another strength is written in place, and replayed."""
    declined = backend_declined(name, DEVICE)
    if declined is not None:
        pytest.skip(f"NOT RUN, LoRAs by {name} in a graph: {declined}")
    backend = _KINDS[name]()
    if operand is not None and (not backend.eight or (operand == FP8 and not FP8_CARD)):
        pytest.skip("NOT RUN: no such precision here")
    weight, adapter, _ = made(1152, 3072, 48, torch.float16)
    out = torch.empty(1152, 3072, dtype=operand or HALF, device=DEVICE)
    scale = None if operand is None else torch.empty(1152, device=DEVICE)

    def run() -> None:
        if scale is not None and operand is not None:
            backend.row_scales(weight.packed, weight.absmax, scale, operand, adapter)
        backend.decode(weight.packed, weight.absmax, out, scale, adapter)

    run()  # what stays is made, and compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, graph = torch.cuda.memory_allocated(), torch.cuda.CUDAGraph()
    run()
    assert torch.cuda.max_memory_allocated() - before <= backend.working_bytes
    with torch.cuda.graph(graph):
        run()
    for strength in (0.0, 1.0, -0.5):
        adapter.scale.fill_(strength)
        graph.replay()
        captured = out.clone()
        run()
        assert torch.equal(captured.view(torch.uint8), out.view(torch.uint8))
