"""The kernels in CUDA C in 8 bits: what holds of Triton's holds of them; on the CPU as cuda_on_cpu.py runs them."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import test_int8_kernels as int8
import torch
from kernel_parts import DEVICE, GPU, HALF, TYPES, assert_same, draw, part
from torch import Tensor

from vortex_core import nf4
from vortex_core.kernels import Kernels, ScaledTensor, compiled, compiled8, nvrtc, reference
from vortex_core.kernels.scaled_tensor import FP8

pytestmark = pytest.mark.usefixtures("seeded")
FP8_CARD = not GPU or torch.cuda.get_device_capability() >= (8, 9)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """In the place of Triton's kernels."""
    cuda_on_cpu.use(monkeypatch)
    return compiled


test_weights_are_rotated_and_fill_each_row = int8.test_weights_are_rotated_and_fill_each_row
test_a_row_of_zeros_stays_zeros = int8.test_a_row_of_zeros_stays_zeros
test_scales_for_fp8_are_what_they_were = int8.test_scales_for_fp8_are_what_they_were
test_modulate = int8.test_modulate
test_gelu = int8.test_gelu
test_quantize_survives_zeros_and_shows_nan = int8.test_quantize_survives_zeros_and_shows_nan


@pytest.mark.parametrize(("m", "k", "n"), [*int8.PRODUCTS, (130, 320, 328)])
@pytest.mark.parametrize("dtype", [*TYPES, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("processors", [1, 10_000])
def test_product(
    fused: Kernels, monkeypatch: pytest.MonkeyPatch, m: int, k: int, n: int, dtype: torch.dtype, biased: bool,
    processors: int,
) -> None:  # fmt: skip
    """By tiles of both widths: a card of many processors gets narrow ones."""
    known = compiled8.card(DEVICE)
    monkeypatch.setattr(compiled8, "card", lambda device: known._replace(processors=processors))
    int8.check_product(fused, m, k, n, dtype, biased)


@pytest.mark.parametrize("n", [3, 61, 130])
def test_a_product_of_any_width(fused: Kernels, n: int) -> None:
    """Rows that no vector fits, and the last of a tile."""
    x, weight = (torch.randint(-127, 128, (rows, 128), dtype=torch.int8, device=DEVICE) for rows in (5, n))
    scales, bias = [torch.rand(rows, device=DEVICE) + 0.5 for rows in (5, n)], draw(n, dtype=HALF)
    found = []
    for kernels in (fused, reference):
        whole = torch.full((6, n + 3), torch.nan, dtype=HALF, device=DEVICE)
        kernels.multiply_int8(x, scales[0] / 2**12, weight, scales[1], bias, whole[:5, 1 : n + 1])
        found.append(whole[:5, 1 : n + 1].clone())
        whole[:5, 1 : n + 1] = torch.nan
        assert whole.isnan().all()
    torch.testing.assert_close(*found, rtol=torch.finfo(HALF).eps, atol=1e-5)


@pytest.mark.parametrize("kernel", ["decode", "narrow", "product"])
def test_results_repeat_bit_for_bit(fused: Kernels, kernel: str) -> None:
    weight, x = nf4.quantize_reference(draw(70, 384)), part(2, 65, 384, HALF)[0]
    found: list[tuple[Tensor, ...]] = []
    for _ in range(3):
        scale, decoded, operand = torch.empty(70, device=DEVICE), int8.eight(70, 384), int8.operand(2, 65, 384)
        fused.row_scales(weight.packed, weight.absmax, scale, torch.int8)
        fused.dequantize(weight.packed, weight.absmax, decoded, scale)
        fused.quantize(x, operand)
        out = torch.full((65, 70), torch.nan, dtype=HALF, device=DEVICE)
        fused.multiply_int8(operand.values[1], operand.scale[1], decoded, scale, None, out)
        found.append({"decode": (scale, decoded), "narrow": operand, "product": (out,)}[kernel])
    for again in found[1:]:
        assert all(map(torch.equal, again, found[0]))


def test_codes_that_no_wide_load_fits(fused: Kernels) -> None:
    """A weight as a file may have it: at no multiple of 16 bytes."""
    weight = nf4.quantize_reference(draw(5, 192))
    packed = torch.empty(weight.packed.numel() + 4, dtype=torch.uint8, device=DEVICE)[4:].view(weight.packed.shape)
    packed.copy_(weight.packed)
    found = []
    for codes in (packed, weight.packed):
        scale, decoded = torch.full((5,), torch.nan, device=DEVICE), int8.eight(5, 192)
        fused.row_scales(codes, weight.absmax, scale, torch.int8)
        fused.dequantize(codes, weight.absmax, decoded, scale)
        found.append((scale, decoded))
    assert packed.data_ptr() % 16
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("first", "wide"), [(0, 100), (4, 92)])
def test_odd_rows_in_fp8_are_the_references(fused: Kernels, first: int, wide: int) -> None:
    x, before = part(1, 3, wide, HALF)[0], part(1, 3, first, HALF)[0] if first else None
    found = []
    for kernels in (fused, reference):
        found.append(operand8(1, 3, first + wide))
        kernels.gelu(x, found[-1], before)
    assert torch.equal(*(each.values.view(torch.uint8) for each in found))


# fp8.


def operand8(batch: int, tokens: int, width: int) -> ScaledTensor:
    values = torch.full((batch, tokens, width), torch.nan, device=DEVICE).to(FP8)
    return ScaledTensor(values, torch.full((batch, tokens), torch.nan, device=DEVICE))


@pytest.mark.skipif(not FP8_CARD, reason="NOT RUN, fp8: this card has none")
@pytest.mark.parametrize("shape", [(1, 64), (37, 192), (130, 320)])
def test_decode_to_fp8_is_bit_exact(fused: Kernels, shape: tuple[int, int]) -> None:
    weight = nf4.quantize_reference(draw(*shape) * torch.logspace(-3, 3, shape[0], device=DEVICE)[:, None])
    scale, found = torch.empty(shape[0], device=DEVICE), []
    fused.row_scales(weight.packed, weight.absmax, scale, FP8)
    for kernels in (fused, reference):
        found.append(torch.full(shape, torch.nan, device=DEVICE).to(FP8))
        kernels.dequantize(weight.packed, weight.absmax, found[-1], scale)
    assert torch.equal(*(each.view(torch.uint8) for each in found))


@pytest.mark.skipif(not FP8_CARD, reason="NOT RUN, fp8: this card has none")
@pytest.mark.parametrize("width", [64, 192, 384, 1280])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["modulate", "residual_modulate", "gelu", "quantize"])
def test_rows_in_fp8(fused: Kernels, width: int, dtype: torch.dtype, name: str) -> None:
    x, again = part(2, 5, width, dtype)
    y, rows, found = part(2, 5, width, dtype)[0], draw(3, width, dtype=dtype), []
    for kernels, stream in ((fused, x), (reference, again)):
        before = {"modulate": rows[1:], "residual_modulate": (y, *rows)}.get(name, ())
        found.append(operand8(2, 5, width))
        getattr(kernels, name)(stream, *before, found[-1])
    assert_same(*found)


def test_what_is_compiled_at_once() -> None:
    """A picture in 16 bits does not wait for the kernels in 8."""
    step, eight = (nvrtc.source(torch.bfloat16, module) for module in ("step", "eight"))
    assert "product_128" not in step
    assert "product_128" in eight
