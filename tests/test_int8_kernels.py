"""Rotated int8: its rotation, how weights and tokens are rounded, and the product."""

from __future__ import annotations

import pytest
import torch
from kernel_parts import DEVICE, GPU, HALF, TYPES, assert_same, draw, part
from torch import Tensor

from vortex_core import nf4
from vortex_core.kernels import ScaledTensor, reference, rotation
from vortex_core.kernels.card import Card

pytestmark = pytest.mark.usefixtures("seeded")

POISON = 0x55
SHAPES = [(1, 64), (5, 192), (3, 128), (3, 2240), (2, 2432)] + [(70, 15360), (130, 320), (1001, 3072)] * GPU


def matrix(k: int) -> Tensor:
    """R of a whole row, fp64 `[K, K]`, by the words of `rotation`."""
    width = rotation.block(k)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < width:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    bit = [(torch.arange(width) >> i) & 1 for i in range(6)]
    signs = (-1.0) ** (bit[0] * bit[1] + bit[2] * bit[3] + bit[4] * bit[5])
    return torch.block_diag(*[signs[:, None] * hadamard / width**0.5] * (k // width)).to(DEVICE)


def eight(*shape: int) -> Tensor:
    return torch.full(shape, POISON, dtype=torch.int8, device=DEVICE)


def operand(batch: int, tokens: int, width: int) -> ScaledTensor:
    """An operand full of another's bytes, as part of a longer one."""
    values, scale = eight(batch, tokens + 2, width), torch.full((batch, tokens + 2), torch.nan, device=DEVICE)
    return ScaledTensor(values, scale).tokens(1, tokens + 1)


def meant(x: ScaledTensor) -> Tensor:
    assert x.scale is not None
    return x.values.double() * x.scale.double()[..., None]


def test_the_rotation_is_orthogonal_and_spreads_a_mean() -> None:
    for k, flat in ((64, 1.0), (192, 1.0), (128, 2**0.5), (384, 2**0.5)):
        width, rotated = rotation.block(k), matrix(k)
        torch.testing.assert_close(rotated @ rotated.t(), torch.eye(k, dtype=torch.float64, device=DEVICE))
        assert float(rotated.sum(0).abs().max()) == pytest.approx(flat)  # a plain Hadamard's is width**0.5
        x = draw(3, k)
        torch.testing.assert_close(rotation.sums(x) / width**0.5, (x.double() @ rotated).float())


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_rotated_and_fill_each_row(fused, shape: tuple[int, int]) -> None:
    weight = nf4.quantize_reference(draw(*shape) * torch.logspace(-3, 3, shape[0], device=DEVICE)[:, None])
    scales = [torch.full(shape[:1], torch.nan, device=DEVICE) for _ in range(2)]
    decoded = [eight(*shape) for _ in range(2)]
    for kernels, scale, out in zip((fused, reference), scales, decoded, strict=True):
        kernels.row_scales(weight.packed, weight.absmax, scale, torch.int8)
        kernels.dequantize(weight.packed, weight.absmax, out, scale)
    torch.testing.assert_close(*scales, rtol=2e-3, atol=0)
    differ = (decoded[0].int() - decoded[1].int()).abs()
    assert int(differ.max()) <= 1
    assert float((differ > 0).float().mean()) < 0.05
    exact = nf4.dequantize(weight, torch.float32).double() @ matrix(shape[1])
    # half a step, and sums in fp16
    off = (decoded[0].double() * scales[0].double()[:, None] - exact).abs() / scales[0].double()[:, None]
    assert float(off.max()) < 0.62
    assert float(off.square().mean()) < 0.1  # a step's own is 1/12
    assert (decoded[0].abs().amax(1) == 127).all()


def test_a_row_of_zeros_stays_zeros(fused) -> None:
    weight = nf4.quantize_reference(torch.zeros(3, 128, device=DEVICE))
    for kernels in (fused, reference):
        scale, out = torch.full((3,), torch.nan, device=DEVICE), eight(3, 128)
        kernels.row_scales(weight.packed, weight.absmax, scale, torch.int8)
        kernels.dequantize(weight.packed, weight.absmax, out, scale)
        assert (scale > 0).all()
        assert not out.any()


def test_scales_for_fp8_are_what_they_were(fused) -> None:
    weight = nf4.quantize_reference(draw(37, 192))
    for kernels in (fused, reference):
        scale = torch.full((37,), torch.nan, device=DEVICE)
        kernels.row_scales(weight.packed, weight.absmax, scale, torch.float8_e4m3fn)
        assert torch.equal(scale, weight.absmax.amax(dim=1) / 448)


def assert_near(ours: ScaledTensor, expected: ScaledTensor, exact: Tensor) -> None:
    """Equal to the reference but where a value falls between two, and near to what is rotated."""
    torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-4, atol=0)
    differ = (ours.values.int() - expected.values.int()).abs()
    assert int(differ.max()) <= 1
    assert float((differ > 0).float().mean()) < 0.01
    for found in (ours, expected):
        off = (meant(found) - exact.double() @ matrix(exact.shape[-1])).abs() / found.scale[..., None]
        assert float(off.max()) < 1.5  # half a step, and the rounding to 16 bits before
        assert float(off.square().mean()) < 0.1  # a step's own is 1/12


@pytest.mark.parametrize("width", [64, 192, 384] + [3072] * GPU)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_modulate(fused, width: int, dtype: torch.dtype, residual: bool) -> None:
    x, again = part(2, 5, width, dtype)
    y, (gate, shift, scale) = part(2, 5, width, dtype)[0], draw(3, width, dtype=dtype)
    results, plain = [], torch.empty(2, 5, width, device=DEVICE)
    for kernels, stream in ((fused, x), (reference, again)):
        results.append(operand(2, 5, width))
        if residual:
            kernels.residual_modulate(stream, y, gate, shift, scale, results[-1])
        else:
            kernels.modulate(stream, shift, scale, results[-1])
    assert_same(ScaledTensor(x), ScaledTensor(again))
    reference.modulate(again, shift, scale, ScaledTensor(plain))
    assert_near(*results, plain)


@pytest.mark.parametrize("widths", [(0, 192), (64, 192), (128, 256)] + [(3072, 12288), (0, 12288)] * GPU)
@pytest.mark.parametrize("dtype", TYPES)
def test_gelu(fused, widths: tuple[int, int], dtype: torch.dtype) -> None:
    first, wide = widths
    x = part(2, 3, wide, dtype)[0]
    before = part(2, 3, first, dtype)[0] if first else None
    ours, expected = (operand(2, 3, first + wide) for _ in range(2))
    fused.gelu(x, ours, before)
    reference.gelu(x, expected, before)
    y = torch.nn.functional.gelu(x.float(), approximate="tanh")
    assert_near(ours, expected, y if before is None else torch.cat((before.float(), y), -1))


@pytest.mark.parametrize("width", [64, 128] + [3072] * GPU)
@pytest.mark.parametrize("dtype", TYPES)
def test_quantize_survives_zeros_and_shows_nan(fused, width: int, dtype: torch.dtype) -> None:
    x = part(2, 3, width, dtype)[0]
    x[1, 1] = 0
    ours, expected = (operand(2, 3, width) for _ in range(2))
    fused.quantize(x, ours)
    reference.quantize(x, expected)
    assert_near(ours, expected, x.float())
    assert not ours.values[1, 1].any()
    x[0, 1, 5] = torch.nan
    for kernels, out in ((fused, ours), (reference, expected)):
        kernels.quantize(x, out)
        assert out.scale.isnan().int().tolist() == [[0, 1, 0], [0, 0, 0]]


PRODUCTS = [(1, 64, 64), (37, 192, 128), (130, 320, 192)]
PRODUCTS += [(1, 3072, 9216), (43, 1152, 320), (513, 15360, 3072), (1280, 3072, 12288)] * GPU


@pytest.mark.parametrize(("m", "k", "n"), PRODUCTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_product(fused, copies: bool, m: int, k: int, n: int, dtype: torch.dtype, biased: bool) -> None:
    check_product(fused, m, k, n, dtype, biased)


@pytest.mark.parametrize("tile", ["LOADED", "FLOWING", "FEWER", "FEWEST"])
def test_product_with_every_tile(fused, monkeypatch: pytest.MonkeyPatch, tile: str) -> None:
    from vortex_core.kernels import int8_product

    if GPU and tile != "LOADED" and not int8_product.card(DEVICE).copies:
        pytest.skip("NOT RUN, tiles by the copy engine: this card has none")
    monkeypatch.setattr(int8_product, "choose", lambda m, n, known: getattr(int8_product, tile))
    check_product(fused, 200, 192, 320, HALF, biased=True)


def test_the_tile_is_one_that_needs_few_rounds(fused) -> None:
    from vortex_core.kernels import int8_product as product

    hopper = Card(132, 227 * 1024, copies=True, early=True)
    for m, n, tile in (
        (4352, 21504, product.FLOWING), (1280, 3072, product.FLOWING), (1024, 3072, product.FEWER),
        (256, 12288, product.FEWER), (256, 3072, product.FEWEST), (1, 3072, product.FEWEST),
    ):  # fmt: skip
        assert product.choose(m, n, hopper) == tile
    # a last round of 24 tiles: its 128 rows are multiplied apart, in more programs
    assert [product.rows_first(m, 3072, hopper) for m in (1280, 4096, 4224, 4352)] == [1280, 4096, 4224, 4224]
    for other in (Card(28, 99 * 1024, copies=False, early=False), Card(70, 99 * 1024, copies=True, early=False)):
        assert product.choose(4352, 3072, other) == product.LOADED
        assert product.rows_first(4352, 3072, other) == 4352


@pytest.mark.parametrize("biased", [False, True])
def test_product_without_triton(biased: bool) -> None:
    check_product(reference, 37, 2112, 128, torch.float32, biased)


def check_product(kernels, m: int, k: int, n: int, dtype: torch.dtype, biased: bool) -> None:
    """A part of a weight, into a part of a result, with values that would overflow 16 bits and inexact sums in fp32."""
    x, whole = (
        torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE) for shape in ((m, k), (n + 64, k + 64))
    )
    x[0], whole[0] = 127, 127
    x_scale, row_scale = torch.rand(m, device=DEVICE) + 0.5, torch.rand(n, device=DEVICE) + 0.5
    weight, bias = whole[:n, :k], draw(n, dtype=dtype) * 1000 if biased else None
    buffer = torch.full((m + 1, n + 128), torch.nan, dtype=dtype, device=DEVICE)
    out = buffer[:m, 64 : 64 + n]
    if dtype == torch.float16:
        x_scale /= 2**12
        row_scale /= 2**12
    kernels.multiply_int8(x, x_scale, weight, row_scale, bias, out)
    exact = (x.double() @ weight.double().t()) * x_scale.double()[:, None] * row_scale.double()
    if bias is not None:
        exact += bias.double()
    step = max(torch.finfo(dtype).eps, 5e-7)
    torch.testing.assert_close(out.double(), exact, rtol=step, atol=float(exact.abs().max()) * 2e-7)
    buffer[:m, 64 : 64 + n] = torch.nan
    assert buffer.isnan().all()  # nothing beside it was written
