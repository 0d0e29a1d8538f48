"""Low-rank updates that decoding adds: each kernel against plain arithmetic, at odd sizes, into poisoned memory."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from kernel_parts import DEVICE, EIGHT, GPU, HALF, draw
from torch import Tensor

from vortex_core import nf4
from vortex_core.kernels import Adapter, Kernels, compiled, compiled8, compiled_adapted, reference, rotation
from vortex_core.kernels.scaled_tensor import FP8_MAX

pytestmark = pytest.mark.usefixtures("seeded")

SHAPES = [(64, 64, 16), (192, 128, 16), (128, 320, 48), (64, 640, 32), (192, 64, 192)]


def made(n: int, k: int, ranks: int, dtype: torch.dtype) -> tuple[nf4.NF4Weight, Adapter, Tensor]:
    """A weight, an update in two parts by three sources, and the update in fp64 by other means."""
    weight = nf4.quantize(draw(n, k)).to(DEVICE)
    parts = 2 if n > 64 else 1
    up, down = draw(n, ranks, dtype=dtype) / 4, draw(parts, ranks, k, dtype=dtype) / 4
    part = torch.arange(n // 64, device=DEVICE, dtype=torch.int32) % parts
    scale = torch.tensor([0.75, -0.5, 0.0], device=DEVICE)[torch.randint(0, 3, (parts, ranks), device=DEVICE)]
    update = torch.empty(n, k, dtype=torch.float64, device=DEVICE)
    for row in range(n):
        p = int(part[row // 64])
        update[row] = (up[row].double() * scale[p].double()) @ down[p].double()
    return weight, Adapter(up, down, part, scale), update


def rotated(adapter: Adapter) -> Adapter:
    return adapter._replace(down=rotation.rotated(adapter.down.float()).to(adapter.down.dtype))


@pytest.fixture(params=["reference", pytest.param("compiled", marks=pytest.mark.gpu), "interpreted", "CUDA C"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if request.param == "reference":
        return reference
    if request.param == "CUDA C":
        if not GPU and cuda_on_cpu.COMPILER is None:
            pytest.skip("NOT RUN, the kernels in CUDA C: there is no C++ compiler here")
        if not GPU:
            for module in (compiled, compiled8, compiled_adapted):
                monkeypatch.setattr(module, "launch", cuda_on_cpu.launch)
        return compiled
    if request.param == "interpreted" and GPU:
        pytest.skip("interpreted: here they run compiled")
    pytest.importorskip("triton", reason="NOT RUN, the Triton kernels: Triton is not installed here")
    from vortex_core.kernels import fused

    return fused


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_an_update_is_added_before_the_one_rounding(
    kernels: Kernels, n: int, k: int, ranks: int, dtype: torch.dtype
) -> None:
    weight, adapter, update = made(n, k, ranks, dtype)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    out = torch.full((n, k), torch.nan, device=DEVICE, dtype=dtype)
    kernels.dequantize(weight.packed, weight.absmax, out, None, adapter)
    # factors are multiplied by their strength in their own type
    near = {torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert (out - expected).abs().max() < near * expected.abs().max()
    assert (out - expected).norm() < near * expected.norm()


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
def test_in_fp8_rows_are_scaled_by_their_largest_value(kernels: Kernels, n: int, k: int, ranks: int) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float32)
    expected = nf4.dequantize(weight, torch.float32).double() + update
    scale = torch.full((n,), torch.nan, device=DEVICE)
    kernels.row_scales(weight.packed, weight.absmax, scale, torch.float8_e4m3fn, adapter)
    torch.testing.assert_close(scale.double(), expected.abs().amax(1) / FP8_MAX, rtol=1e-5, atol=0)
    out = torch.full((n, k), torch.nan, device=DEVICE).to(EIGHT)
    kernels.dequantize(weight.packed, weight.absmax, out, scale, adapter)
    meant = out.double() * scale[:, None]
    assert (meant - expected).norm() < (0.04 if GPU else 1e-5) * expected.norm()
    assert (out.float().abs().amax(1) - FP8_MAX).abs().max() < 1e-2


@pytest.mark.parametrize(("n", "k", "ranks"), SHAPES)
def test_in_int8_the_sum_is_rotated_and_fills_the_range(kernels: Kernels, n: int, k: int, ranks: int) -> None:
    weight, adapter, update = made(n, k, ranks, torch.float32)
    whole = nf4.dequantize(weight, torch.float32).double() + update
    expected = rotation.rotated(whole.float()).double()
    scale = torch.full((n,), torch.nan, device=DEVICE)
    kernels.row_scales(weight.packed, weight.absmax, scale, torch.int8, rotated(adapter))
    torch.testing.assert_close(scale.double(), expected.abs().amax(1) / 127, rtol=1e-3, atol=0)
    out = torch.full((n, k), 0x55, device=DEVICE, dtype=torch.int8)
    kernels.dequantize(weight.packed, weight.absmax, out, scale, rotated(adapter))
    steps = out.double() - expected / scale.double()[:, None]
    assert steps.abs().max() < 0.6  # half a step, and levels in fp16
    assert set(out.abs().amax(1).tolist()) == {127}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_an_update_can_be_added_to_what_was_decoded(dtype: torch.dtype) -> None:
    weight, adapter, update = made(192, 128, 32, dtype)
    out = nf4.dequantize(weight, dtype)
    expected = out.double() + update
    adapter.add_to(out)
    near = {torch.float32: 2e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert (out - expected).abs().max() < near * expected.abs().max()


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
