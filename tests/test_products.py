"""Products over NF4 weights in each precision: where inputs and outputs lie, what is added, how near they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear

from vortex_core import nf4
from vortex_core.kernels import ScaledTensor, reference
from vortex_core.kernels.scaled_tensor import FP8
from vortex_core.quant.backends import Backend, ReferenceBackend
from vortex_core.quant.linear import NF4Linear, multiply
from vortex_core.quant.precision import EXACT, Exact, Fp8, Int8, Precision

pytestmark = pytest.mark.usefixtures("seeded")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def twins(n: int, k: int, *, bias: bool) -> tuple[NF4Linear, Linear]:
    """The same linear in NF4 and plain."""
    torch.manual_seed(0)
    weight = nf4.quantize(torch.randn(n, k))
    linear = NF4Linear(weight, torch.randn(n) if bias else None, ReferenceBackend())
    plain = Linear(k, n, bias=bias)
    plain.weight.data = nf4.dequantize(weight, torch.float32)
    plain.bias = None if linear.bias is None else nn.Parameter(linear.bias)
    return linear, plain.requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_multiply_fills_a_part_of_a_longer_buffer(batch: int, bias: bool) -> None:
    """As text and image write into one qkv buffer, from rows that are part of wider ones."""
    linear, plain = twins(24, 128, bias=bias)
    x = torch.randn(batch, 7, 192)[..., 64:]
    expected = plain(x)
    for module in (linear, plain):
        whole = torch.full((batch, 10, 24), torch.nan)
        multiply(module, ScaledTensor(x), whole[:, 2:9])
        torch.testing.assert_close(whole[:, 2:9], expected)
        assert whole[:, :2].isnan().all()
        assert whole[:, 9:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_parts_lie_apart_and_are_meant_side_by_side(device: str, batch: int, bias: bool) -> None:
    """As `linear1` writes q, k, v and the MLP, and `linear2` takes attention's output and the MLP."""
    wide, narrow = twins(24 + 64, 128, bias=bias), twins(24, 64 + 64, bias=bias)
    x, attn = torch.randn(2, batch, 10, 128, device=device)[:, :, 2:9]
    for linear1, linear2 in zip(wide, narrow, strict=True):
        linear1.to(device), linear2.to(device)
        first, last, y = (torch.full((batch, 7, n), torch.nan, device=device) for n in (24, 64, 24))
        multiply(linear1, ScaledTensor(x), [first, last], gelu=True)
        whole = linear1(x)
        torch.testing.assert_close(first, whole[..., :24], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, F.gelu(whole[..., 24:], approximate="tanh"), rtol=1e-4, atol=2**-10)
        multiply(linear2, [ScaledTensor(attn[..., 64:]), ScaledTensor(last)], y)
        torch.testing.assert_close(y, linear2(torch.cat((attn[..., 64:], last), dim=2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gelu_of_a_product_is_the_tanh_form(device: str, dtype: torch.dtype) -> None:
    """To one rounding, and the hardware's tanh, which is good to 2^-11. The forms are farthest apart about -2.7."""
    x = torch.cat((torch.linspace(-8, 8, 8192), torch.linspace(-3.2, -2.2, 8192))).view(128, 128).to(device, dtype)
    out, one = torch.full_like(x, torch.nan), torch.eye(128, device=device, dtype=dtype)
    EXACT.product(x, None, one, None, torch.zeros_like(x[0]), out, gelu=True)
    tanh, erf = (F.gelu(x.double(), approximate=form) for form in ("tanh", "none"))
    torch.testing.assert_close(out.double(), tanh, rtol=torch.finfo(dtype).eps / 2, atol=2**-10)
    assert (out - tanh)[64:].abs().mean() < (out - erf)[64:].abs().mean() / 2


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("precision", "bound"), [(Fp8(), 0.013), (Int8(), 0.004)], ids=str)
def test_a_product_is_as_close_as_8_bits_allow(batch: int, precision: Precision, bound: float) -> None:
    torch.manual_seed(0)
    weight = nf4.quantize(torch.randn(24, 128) * torch.logspace(-2, 2, 24)[:, None])
    linear = NF4Linear(weight, torch.randn(24), ReferenceBackend())
    linear.use(precision)
    x = torch.randn(batch, 7, 128) * torch.logspace(-2, 2, 7)[:, None]
    operand = ScaledTensor(torch.empty(x.shape, dtype=precision.operand), torch.empty(x.shape[:2]))
    reference.quantize(x, operand)
    out = torch.full((batch, 7, 24), torch.nan)
    multiply(linear, operand, out)
    # in fp8 both operands round to 3 bits, 2.6% each, in 128 terms that add up like noise: 0.3%, and four times that at
    # worst; in int8 a rotated row is like noise, whose largest value is some 3 times its spread: 0.7% each
    length = x.norm(dim=-1)[..., None] * nf4.dequantize(weight, torch.float32).norm(dim=1)
    assert ((out - linear(x)).abs() / length).max() < bound


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 42, 43, 63, 64])
@pytest.mark.parametrize("width", [3072, 12288, 15360])
def test_an_fp8_product_of_few_rows(rows: int, width: int) -> None:
    """The smallest pictures have 16 tokens; cuBLASLt refused up to 42 with a bias."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, width, device="cuda").to(FP8) for n in (rows, 3072))
    scale, scales = (torch.rand(n, device="cuda") for n in (rows, 3072))
    bias = torch.randn(3072, device="cuda", dtype=torch.bfloat16)
    out = torch.full((rows, 3072), torch.nan, device="cuda", dtype=torch.bfloat16)
    Fp8().product(x, scale, weight, scales, bias, out)
    expected = (x.float() * scale[:, None]) @ (weight.float() * scales[:, None]).t() + bias
    # the library sums in less than fp32: of all, 0.003 of their length; of one, 0.034 of what its sum spreads (H200)
    error, spread = (out.float() - expected).abs(), scale[:, None] * scales * width**0.5
    assert error.norm() < 0.005 * expected.norm()
    assert (error / (spread + bias.abs())).max() < 0.05


def test_the_sum_of_a_product_is_given_or_what_is_there() -> None:
    x, weight, bias, before = torch.randn(5, 64), torch.randn(3, 64), torch.randn(3), torch.randn(5, 3)
    plain = x @ weight.t()
    for gelu in (False, True):
        for addend, expected in ((None, plain), (bias, plain + bias), ("out", plain + before)):
            out = before.clone()
            EXACT.product(x, None, weight, None, out if addend == "out" else addend, out, gelu=gelu)
            wanted = F.gelu(expected, approximate="tanh") if gelu else expected
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    out = torch.full((5, 3), torch.nan)
    EXACT.product(x, None, weight, None, None, out)  # nothing of it is read, nor bent by default
    torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_in_fp8_is_scaled_by_row_and_by_column(with_bias: bool) -> None:
    x, weight = torch.randn(5, 64).to(FP8), torch.randn(3, 64).to(FP8)
    scale, scales = torch.logspace(-1, 1, 5), torch.logspace(-2, 2, 3)
    bias = 100 * torch.randn(3) if with_bias else None
    out = torch.full((5, 3), torch.nan)
    Fp8().product(x, scale, weight, scales, bias, out)
    expected = scale[:, None] * (x.float() @ weight.float().t()) * scales
    torch.testing.assert_close(out, expected if bias is None else expected + bias)


@pytest.mark.parametrize("precision", [Fp8(), Int8()], ids=str)
def test_a_product_in_8_bits_needs_both_scales(precision: Precision) -> None:
    assert precision.operand is not None
    x = torch.ones(2, 64).to(precision.operand)
    for scales in ((torch.ones(2), None), (None, torch.ones(2))):
        with pytest.raises(AssertionError):
            precision.product(x, scales[0], x, scales[1], None, torch.empty(2, 2))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that are multiplied, `[M, K]`."""
    told: list[tuple[int, ...]] = []

    for kind in (Exact, Fp8, Int8):

        def counted(self: Precision, x: Tensor, *rest: Any, gelu: bool = False, product: Any = kind.product) -> None:
            told.append(tuple(x.shape))
            product(self, x, *rest, gelu=gelu)

        monkeypatch.setattr(kind, "product", counted)
    return told


def made(n: int, k: int, precision: Precision = EXACT) -> NF4Linear:
    layer = NF4Linear(nf4.quantize(torch.randn(n, k) * torch.logspace(-1, 1, n)[:, None]), torch.randn(n),
                      ReferenceBackend())  # fmt: skip
    layer.use(precision)
    return layer


def apart(*shape: int) -> Tensor:
    """Pictures with something between each and the next, which nothing may touch."""
    batch, tokens, width = shape
    return torch.full((batch, tokens + 2, width), torch.nan)[:, 1:-1]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("x_apart", [False, True])
@pytest.mark.parametrize("out_apart", [False, True])
def test_pictures_that_lie_together_are_one_product(
    products: list[tuple[int, ...]], batch: int, tokens: int, x_apart: bool, out_apart: bool
) -> None:
    layer, values = made(6, 128), torch.randn(batch, tokens, 128)
    x = (apart(batch, tokens, 128) if x_apart else torch.empty(batch, tokens, 128)).copy_(values)
    out = apart(batch, tokens, 6) if out_apart else torch.full((batch, tokens, 6), torch.nan)
    multiply(layer, ScaledTensor(x), out)
    torch.testing.assert_close(out, layer(values), rtol=1e-4, atol=1e-4)
    together = batch == 1 or not (x_apart or out_apart)
    assert products == ([(batch * tokens, 128)] if together else [(tokens, 128)] * batch)


@pytest.mark.parametrize(("values_apart", "scale_apart"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("precision", "bound"), [(Fp8(), 0.013), (Int8(), 0.004)], ids=str)
def test_pictures_in_8_bits_take_their_scales_along(
    products: list[tuple[int, ...]], values_apart: bool, scale_apart: bool, precision: Precision, bound: float
) -> None:
    layer, batch, dtype = made(6, 128, precision), 2, precision.operand
    x = torch.randn(batch, 5, 128) * torch.logspace(-2, 2, 10).view(batch, 5, 1)
    values = torch.zeros(batch, 7, 128, dtype=dtype)[:, 1:-1] if values_apart else torch.zeros_like(x, dtype=dtype)
    scale = torch.full((batch, 7), torch.nan)[:, 1:-1] if scale_apart else torch.full((batch, 5), torch.nan)
    reference.quantize(x, operand := ScaledTensor(values, scale))
    out = torch.full((batch, 5, 6), torch.nan)
    multiply(layer, operand, out)
    length = x.norm(dim=-1)[..., None] * nf4.dequantize(nf4.NF4Weight(layer.packed, layer.absmax), torch.float32).norm(
        dim=1
    )
    assert ((out - layer(x)).abs() / length).max() < bound
    assert products == ([(5, 128)] * 2 if values_apart or scale_apart else [(10, 128)])


@pytest.mark.parametrize("precision", [EXACT, Fp8(), Int8()], ids=str)
def test_outputs_side_by_side_have_their_rows_scales_and_bias(
    products: list[tuple[int, ...]], precision: Precision
) -> None:
    layer, x = made(3 + 8 + 1, 128, precision), torch.randn(2, 5, 128)
    operand = ScaledTensor(x)
    if precision.operand is not None:
        operand = ScaledTensor(torch.empty(x.shape, dtype=precision.operand), torch.empty(2, 5))
        reference.quantize(x, operand)
    parts = [torch.full((2, 5, n), torch.nan) for n in (3, 8, 1)]
    multiply(layer, operand, parts)
    whole = torch.full((2, 5, 12), torch.nan)
    multiply(layer, operand, whole)
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole)
    assert products == [(10, 128)] * 4


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_side_by_side_add_up_and_the_gelu_is_of_all(bias: bool) -> None:
    """The bias once, and the GELU once, of the last output alone."""
    layer, xs = made(3 + 8, 64 + 128 + 64), [torch.randn(2, 5, k) for k in (64, 128, 64)]
    layer.bias = layer.bias if bias else None
    plain = nn.Linear(256, 11, bias=bias).requires_grad_(False)
    plain.weight.data = nf4.dequantize(nf4.NF4Weight(layer.packed, layer.absmax), torch.float32)
    plain.bias = nn.Parameter(layer.bias, requires_grad=False) if layer.bias is not None else None
    expected = plain(torch.cat(xs, dim=-1))
    for module in (layer, plain):
        for gelu in (False, True):
            first, last = (torch.full((2, 5, n), torch.nan) for n in (3, 8))
            multiply(module, [ScaledTensor(x) for x in xs], [first, last], gelu=gelu)
            torch.testing.assert_close(first, expected[..., :3], rtol=1e-4, atol=1e-4)
            bent = F.gelu(expected[..., 3:], approximate="tanh")
            torch.testing.assert_close(last, bent if gelu else expected[..., 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [EXACT, Fp8(), Int8()], ids=str)
def test_multiply_decodes_in_its_lane_once_and_in_its_precision(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    layer, told, decode = made(6, 128, precision), [], ReferenceBackend.dequantize

    def counted(backend: Backend, packed: Tensor, absmax: Tensor, dtype: torch.dtype, *rest: Any) -> Tensor:
        told.append((dtype, *rest))
        return decode(backend, packed, absmax, dtype, *rest)

    monkeypatch.setattr(ReferenceBackend, "dequantize", counted)
    x, out = torch.randn(1, 5, 128), torch.empty(1, 5, 6)
    operand = ScaledTensor(x)
    if precision.operand is not None:
        reference.quantize(x, operand := ScaledTensor(torch.empty_like(x, dtype=precision.operand), torch.empty(1, 5)))
    multiply(layer, operand, [out[..., :2], out[..., 2:]])
    multiply(layer, operand, out, scratch=1)
    dtype = precision.operand or torch.float32
    assert told == [(dtype, layer.row_scale, 0), (dtype, layer.row_scale, 1)]


def test_a_weight_that_comes_later_gets_its_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model is built on `meta` in its precision, and filled after that."""
    for precision in (EXACT, Fp8(), Int8()):
        layer = NF4Linear.like(Linear(128, 6, device="meta"), ReferenceBackend())
        layer.use(precision)
        assert (layer.row_scale is None) == (precision.operand is None)
        layer.fill(nf4.quantize(torch.randn(6, 128)))
        if layer.row_scale is not None:
            assert layer.row_scale.device.type == "cpu"
            assert torch.isfinite(layer.row_scale).all()
            assert layer.row_scale.min() > 0


def test_multiply_is_for_linears() -> None:
    with pytest.raises(AssertionError):
        multiply(nn.Conv2d(1, 1, 1), ScaledTensor(torch.randn(1, 5, 128)), torch.empty(1, 5, 6))
