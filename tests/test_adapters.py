"""Low-rank updates that decoding adds: each kernel against plain arithmetic, at odd sizes, into poisoned memory."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from kernel_parts import DEVICE, HALF, draw
from test_kernel_memory import empty_on_meta, peak
from torch import Tensor

from vortex_core import nf4
from vortex_core.kernels import ADD_BYTES, Adapter, Kernels, compiled, reference, rotation
from vortex_core.kernels.adapter import arranged, natural
from vortex_core.kernels.scaled_tensor import FP8, FP8_MAX
from vortex_core.quant.backends import BitsAndBytesBackend, ReferenceBackend

pytestmark = pytest.mark.usefixtures("seeded")

SHAPES = [(64, 64, 16), (80, 192, 16), (192, 128, 16), (128, 320, 48), (64, 640, 32), (192, 64, 192)]


def made(n: int, k: int, ranks: int, dtype: torch.dtype) -> tuple[nf4.NF4Weight, Adapter, Tensor]:
    """A weight, an update in two parts by three sources, and the update in fp64 by other means."""
    weight = nf4.quantize(draw(n, k)).to(DEVICE)
    parts = 2 if n > 64 else 1
    up, down = draw(n, ranks, dtype=dtype) / 4, draw(parts, ranks, k, dtype=dtype) / 4
    part = torch.arange(-(-n // 64), device=DEVICE, dtype=torch.int32) % parts
    scale = torch.tensor([0.75, -0.5, 0.0], device=DEVICE)[torch.randint(0, 3, (parts, ranks), device=DEVICE)]
    update = torch.empty(n, k, dtype=torch.float64, device=DEVICE)
    for row in range(n):
        p = int(part[row // 64])
        update[row] = (up[row].double() * scale[p].double()) @ down[p].double()
    return weight, Adapter(up, arranged(down), part, scale), update


@pytest.fixture(params=["reference", "CUDA C", pytest.param("beside Triton", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param == "reference":
        return reference
    if request.param == "CUDA C":
        cuda_on_cpu.use(monkeypatch)
        return compiled
    pytest.importorskip("triton", reason="NOT RUN, the Triton kernels: Triton is not installed here")
    from vortex_core.kernels import fused

    return fused


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_an_update_is_added_before_the_one_rounding(
    kernels: Kernels, n: int, k: int, ranks: int, dtype: torch.dtype
) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float32 if dtype == torch.float32 else torch.float16)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    out = torch.full((n, k), torch.nan, device=DEVICE, dtype=dtype)
    kernels.dequantize(weight.packed, weight.absmax, out, None, adapter)
    # factors are multiplied by their strength in their own type
    near = {torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert (out - expected).abs().max() < near * expected.abs().max()
    assert (out - expected).norm() < near * expected.norm()


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
def test_in_fp8_rows_are_scaled_by_their_largest_value(kernels: Kernels, n: int, k: int, ranks: int) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float16)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    scale = torch.full((n,), torch.nan, device=DEVICE)
    kernels.row_scales(weight.packed, weight.absmax, scale, FP8, adapter)
    torch.testing.assert_close(scale.double(), expected.abs().amax(1) / FP8_MAX, rtol=1e-3, atol=0)
    out = torch.full((n, k), torch.nan, device=DEVICE).to(FP8)
    kernels.dequantize(weight.packed, weight.absmax, out, scale, adapter)
    plain = (expected / scale.double()[:, None]).float().clamp(-FP8_MAX, FP8_MAX).to(FP8)
    off, least = ((x.double() * scale[:, None] - expected).norm() for x in (out, plain))
    assert off < 1.01 * least
    assert (out.float().abs().amax(1) == FP8_MAX).all()


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
def test_in_int8_the_sum_is_rotated_and_fills_the_range(kernels: Kernels, n: int, k: int, ranks: int) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float16)
    whole = nf4.dequantize(weight, torch.float32).double() + update
    expected = rotation.rotated(whole.float()).double()
    scale = torch.full((n,), torch.nan, device=DEVICE)
    kernels.row_scales(weight.packed, weight.absmax, scale, torch.int8, adapter)
    torch.testing.assert_close(scale.double(), expected.abs().amax(1) / 127, rtol=2e-3, atol=0)
    out = torch.full((n, k), 0x55, device=DEVICE, dtype=torch.int8)
    kernels.dequantize(weight.packed, weight.absmax, out, scale, adapter)
    steps = out.double() - expected / scale.double()[:, None]
    assert steps.abs().max() < 0.75  # half a step, and sums in fp16
    assert steps.square().mean() < 1.02 / 12
    assert set(out.abs().amax(1).tolist()) == {127}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_an_update_can_be_added_to_what_was_decoded(dtype: torch.dtype) -> None:
    weight, adapter, update = made(192, 128, 32, dtype)
    out = nf4.dequantize(weight, dtype)
    expected = out.double() + update
    adapter.add_to(out)
    near = {torch.float32: 2e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert (out - expected).abs().max() < near * expected.abs().max()


@pytest.mark.parametrize(
    ("n", "k", "parts", "ranks"), [(21504, 3072, 4, 16), (3072, 15360, 1, 640), (3072, 3072, 2, 2048)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_added_later_reads_nothing_on_the_host_and_takes_what_it_says(
    n: int, k: int, parts: int, ranks: int, dtype: torch.dtype
) -> None:
    """On `meta` there is nothing to read."""
    up, down = empty_on_meta(n, ranks, dtype=torch.float16), empty_on_meta(parts, ranks, k, dtype=torch.float16)
    part, scale = empty_on_meta(n // 64, dtype=torch.int32), empty_on_meta(parts, ranks, dtype=torch.float32)
    adapter, weight = Adapter(up, down, part, scale), empty_on_meta(n, k, dtype=dtype)
    assert ADD_BYTES / 2 < peak(lambda: adapter.add_to(weight)) <= ADD_BYTES
    assert all(kind.working_bytes >= ADD_BYTES for kind in (BitsAndBytesBackend, ReferenceBackend))


def test_the_order_of_a_factor_can_be_undone() -> None:
    down = draw(2, 48, 320)
    assert torch.equal(natural(arranged(down)), down)
    assert torch.equal(natural(arranged(down), slice(64, 192), torch.float64), down[:, :, 64:192].double())
    assert torch.equal(natural(arranged(down), slice(256, 400)), down[:, :, 256:])


@pytest.mark.parametrize("at_once", [1, 1000, 4096])
def test_what_is_added_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("vortex_core.kernels.adapter.AT_ONCE", at_once)
    weight, adapter, update = made(80, 128, 16, torch.float32)
    out = nf4.dequantize(weight, torch.float32)
    expected = out.double() + update
    adapter.add_to(out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_strength_nothing_changes(kernels: Kernels) -> None:
    weight, adapter, _ = made(192, 128, 16, torch.float32)
    still = adapter._replace(scale=torch.zeros_like(adapter.scale))
    out, expected = (torch.full((192, 128), torch.nan, device=DEVICE) for _ in range(2))
    kernels.dequantize(weight.packed, weight.absmax, out, None, still)
    kernels.dequantize(weight.packed, weight.absmax, expected)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_some_rows_of_an_update_are_those_of_all() -> None:
    _, adapter, update = made(192, 128, 16, torch.float32)
    for start, stop in ((0, 192), (10, 70), (64, 128), (191, 192), (3, 5)):
        torch.testing.assert_close(adapter.rows(start, stop).double(), update[start:stop], rtol=1e-4, atol=1e-5)
