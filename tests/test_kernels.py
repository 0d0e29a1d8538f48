"""The Triton kernels against their plain torch references, at odd sizes and into buffers full of NaN.

Without a GPU they run in Triton's interpreter, as conftest.py says; the tests marked `gpu` run them compiled.
The interpreter cuts bf16 where hardware rounds and drops the carry when it rounds to fp8. So on the CPU fp16
stands for the one, and for the other fp32: what is checked there is everything but the rounding.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vortex_core import nf4
from vortex_core.kernels import (
    Heads,
    Kernels,
    Moments,
    ScaledTensor,
    Window,
    _heads_broken,
    attends_in_fp8,
    choose_kernels,
    most_parts,
    reference,
)
from vortex_core.kernels.capabilities import card
from vortex_core.kernels.scaled_tensor import FP8, FP8_MAX, TILE, empty_heads
from vortex_core.quant.linear import _fp8_broken, fp8_declined

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
TYPES = [torch.float32, HALF]
EIGHT = FP8 if GPU else torch.float32


@pytest.fixture(scope="module", params=[pytest.param("compiled", marks=pytest.mark.gpu), "interpreted"])
def fused(request: pytest.FixtureRequest) -> object:
    """The module under test."""
    if request.param == "interpreted" and GPU:
        pytest.skip("interpreted: here they run compiled")
    pytest.importorskip("triton", reason="NOT RUN, the Triton kernels: Triton is not installed here")
    from vortex_core.kernels import fused

    return fused


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def part(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two equal `[B, T, W]` views into wider and longer buffers, as the step has them."""
    whole = draw(batch, tokens + 3, width + 64, dtype=dtype)
    return tuple(copy[:, 2 : 2 + tokens, 32 : 32 + width] for copy in (whole, whole.clone()))


def empty(batch: int, tokens: int, width: int, dtype: torch.dtype, *, scaled: bool = False) -> ScaledTensor:
    """An operand full of NaN."""
    scale = torch.full((batch, tokens), torch.nan, device=DEVICE) if scaled else None
    return ScaledTensor(torch.full((batch, tokens, width), torch.nan, device=DEVICE).to(dtype), scale)


def meant(operand: ScaledTensor) -> Tensor:
    values = operand.values.float()
    return values if operand.scale is None else values * operand.scale[..., None]


def assert_same(ours: ScaledTensor, expected: ScaledTensor) -> None:
    """Equal up to one rounding of the type."""
    step = torch.finfo(ours.values.dtype).eps if ours.values.dtype != torch.float32 else 1e-5
    assert torch.isfinite(meant(ours)).all()
    if ours.scale is not None:
        torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)
        floor = expected.scale.max() * 2**-9  # fp8's smallest step
    else:
        floor = 1e-5
    torch.testing.assert_close(meant(ours), meant(expected), rtol=step, atol=float(floor))
    # rounding may fall the other way here and there, but not often
    assert (ours.values.float() != expected.values.float()).float().mean() < (1 if step < 1e-4 else 0.02)


@pytest.mark.parametrize("shape", [(1, 64), (37, 192), (130, 320)])
@pytest.mark.parametrize("dtype", TYPES)
def test_decode_is_bit_exact(fused, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = nf4.quantize_reference(draw(*shape))
    ours = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)
    fused.dequantize(weight.packed, weight.absmax, ours)
    assert torch.equal(ours, nf4.dequantize(weight, dtype))


@pytest.mark.parametrize("shape", [(1, 64), (37, 192), (130, 320)])
def test_decode_to_fp8_fills_each_row(fused, shape: tuple[int, int]) -> None:
    weight = nf4.quantize_reference(draw(*shape) * torch.logspace(-3, 3, shape[0], device=DEVICE)[:, None])
    scale = reference.row_scales(weight.absmax)
    ours, expected = (torch.full(shape, torch.nan, device=DEVICE).to(EIGHT) for _ in range(2))
    fused.dequantize(weight.packed, weight.absmax, ours, scale)
    reference.dequantize(weight.packed, weight.absmax, expected, scale)
    assert_same(ScaledTensor(ours[None], scale[None]), ScaledTensor(expected[None], scale[None]))
    torch.testing.assert_close(ours.float().abs().amax(1), torch.full_like(scale, FP8_MAX))


@pytest.mark.parametrize("width", [64, 192, 3072])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_modulate(fused, width: int, dtype: torch.dtype, scaled: bool, residual: bool) -> None:
    x, again = part(2, 5, width, dtype)
    y, (gate, shift, scale) = part(2, 5, width, dtype)[0], draw(3, width, dtype=dtype)
    results = []
    for kernels, stream in ((fused, x), (reference, again)):
        results.append(empty(2, 5, width, EIGHT if scaled else dtype, scaled=scaled))
        if residual:
            kernels.residual_modulate(stream, y, gate, shift, scale, results[-1])
        else:
            kernels.modulate(stream, shift, scale, results[-1])
    assert_same(ScaledTensor(x), ScaledTensor(again))
    assert_same(*results)


@pytest.mark.parametrize("widths", [(0, 192), (64, 192), (3072, 12288)])
@pytest.mark.parametrize("dtype", TYPES)
def test_gelu(fused, widths: tuple[int, int], dtype: torch.dtype) -> None:
    first, wide = widths
    x = part(2, 3, wide, dtype)[0]
    before = part(2, 3, first, dtype)[0] if first else None
    ours, expected = (empty(2, 3, first + wide, EIGHT, scaled=True) for _ in range(2))
    fused.gelu(x, ours, before)
    reference.gelu(x, expected, before)
    assert_same(ours, expected)


@pytest.mark.parametrize("width", [64, 3072])
def test_quantize_survives_zeros(fused, width: int) -> None:
    x = part(2, 3, width, HALF)[0]
    x[1, 1] = 0
    ours, expected = (empty(2, 3, width, EIGHT, scaled=True) for _ in range(2))
    fused.quantize(x, ours)
    reference.quantize(x, expected)
    assert_same(ours, expected)


@pytest.mark.parametrize("heads", [2, 3, 24])
@pytest.mark.parametrize("dtype", TYPES)
def test_rotate_leaves_values_alone(fused, heads: int, dtype: torch.dtype) -> None:
    qkv = draw(2, 7, 3, heads, 128, dtype=dtype)
    query_norm, key_norm = draw(2, 128, dtype=dtype)
    angle = draw(5, 64)
    ours, expected = qkv.clone(), qkv.clone()
    for kernels, copy in ((fused, ours), (reference, expected)):
        kernels.rotate(copy[:, 2:], query_norm, key_norm, angle.cos(), angle.sin())
    assert torch.equal(ours[:, :2], qkv[:, :2])
    assert torch.equal(ours[:, :, 2], qkv[:, :, 2])
    assert_same(ScaledTensor(ours), ScaledTensor(expected))


def heads_for(qkv: Tensor) -> Heads:
    """Full of NaN, in fp8 or what stands for it."""
    heads = empty_heads(qkv, EIGHT)
    for part in heads:
        part.copy_(torch.full(part.shape, torch.nan))
    return heads


def queries_keys_values(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """What is meant, each `[B, L, H, C]` in fp64, by the words of `Heads`."""
    q, k = (x.double() * unit for x, unit in zip((heads.q, heads.k), heads.unit, strict=True))
    v = heads.v.double() * heads.v_scale.double().repeat_interleave(TILE, dim=2)[:, :, None]
    place = [
        16 * n + 4 * j + 2 * i + e for n in range(v.shape[-1] // 16) for i in (0, 1) for j in range(4) for e in (0, 1)
    ]
    return q, k, v[..., place].permute(0, 3, 1, 2)[:, : q.shape[1]]


HEADS = [(1, 1, 2, 0), (2, 37, 3, 5), (1, 128, 2, 128), (1 + GPU, 300, 2, 130)] + [(2, 1300, 24, 256)] * GPU


def draw_heads(batch: int, tokens: int, count: int) -> Tensor:
    """`[B, L, 3, H, C]` as a single block has it: in the front of wider rows."""
    width = 3 * count * 128
    return draw(batch, tokens, width + 64, dtype=HALF)[..., :width].unflatten(-1, (3, count, 128))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "tokens", "count", "boundary"), HEADS)
def test_heads_are_packed(fused, batch: int, tokens: int, count: int, boundary: int) -> None:
    check_packing(fused, batch, tokens, count, boundary)


@pytest.mark.parametrize(("batch", "tokens", "count", "boundary"), HEADS)
def test_heads_are_packed_without_triton(batch: int, tokens: int, count: int, boundary: int) -> None:
    check_packing(reference, batch, tokens, count, boundary)


def check_packing(kernels, batch: int, tokens: int, count: int, boundary: int) -> None:
    qkv = draw_heads(batch, tokens, count)
    qkv[-1, -1, 2, -1] = 0
    norms = [norm * scale for norm, scale in zip(draw(4, 128, dtype=HALF), (1, 0.1, 3, 30), strict=True)]
    angle = draw(tokens, 64)
    cos, sin = angle.cos(), angle.sin()
    heads = heads_for(qkv)
    kernels.pack_heads(qkv, norms, boundary, cos, sin, heads)
    found = queries_keys_values(heads)
    exact = qkv.double()
    for part, (query, key) in ((slice(boundary), norms[:2]), (slice(boundary, None), norms[2:])):
        reference.rotate(exact[:, part], query, key, cos[part], sin[part])
    step = torch.finfo(EIGHT).eps if EIGHT == FP8 else 1e-4
    bound = 128**0.5 * max(float(norm.abs().max()) for norm in norms)
    for ours, theirs, largest in zip(
        found, exact.unbind(2), (bound, bound, float(exact[:, :, 2].abs().max())), strict=True
    ):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=step / 2 + 1e-3, atol=largest / FP8_MAX * 2**-9)
    assert float(heads.q.float().abs().max()) <= FP8_MAX


@pytest.mark.parametrize(("batch", "tokens", "count", "boundary"), HEADS)
def test_attention_of_packed_heads(fused, copies: bool, batch: int, tokens: int, count: int, boundary: int) -> None:
    # weights are rounded to three bits
    check_attention(fused, batch, tokens, count, boundary, rounding=0.03 if EIGHT == FP8 else 2e-3)


@pytest.mark.parametrize(("batch", "tokens", "count", "boundary"), HEADS)
def test_attention_of_packed_heads_without_triton(batch: int, tokens: int, count: int, boundary: int) -> None:
    check_attention(reference, batch, tokens, count, boundary, rounding=3e-3)


def check_attention(kernels, batch: int, tokens: int, count: int, boundary: int, rounding: float) -> None:
    qkv = draw_heads(batch, tokens, count)
    qkv[:, tokens // 2 :, 2] *= 8  # tiles of values with scales of their own
    norms, angle = list(2 * draw(4, 128).abs().to(HALF)), draw(tokens, 64)
    heads = heads_for(qkv)
    reference.pack_heads(qkv, norms, boundary, angle.cos(), angle.sin(), heads)
    out = qkv[:, :, 0]
    others = qkv[:, :, 1:].clone()
    kernels.attend_heads(heads, out)
    q, k, v = (x.transpose(1, 2) for x in queries_keys_values(heads))
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert float((out.double() - exact).norm() / exact.norm()) < rounding
    assert torch.equal(qkv[:, :, 1:], others)


def picture(*shape: int, dtype: torch.dtype) -> Tensor:
    return draw(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """A map full of NaN."""
    return torch.full(shape, torch.nan, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def no_moments(groups: int, capacity: int) -> Moments:
    return Moments(torch.full((3, groups, capacity), torch.nan, device=DEVICE))


def terms(kernels: Kernels, moments: Moments, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.full((2, len(weight)), torch.nan, device=DEVICE)
    kernels.norm_terms(moments, weight, bias, reference.EPSILON, out)
    return out


def beside(window: Window) -> Tensor:
    """For the window with its border, full of NaN."""
    _, channels, height, width = window.strip.shape
    return unwritten(1, channels, height + 2, width + 2, dtype=window.strip.dtype)


def strips(x: Tensor, height: int) -> list[Window]:
    cut = x.split(height, dim=2)
    above = [None, *(strip[:, :, -1:] for strip in cut[:-1])]
    below = [*(strip[:, :, :1] for strip in cut[1:]), None]
    return [Window(*parts) for parts in zip(above, cut, below, strict=True)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch goes through everything in many steps."""
    monkeypatch.setattr("vortex_core.kernels.scaled_tensor.CHUNK", 700)
    monkeypatch.setattr("vortex_core.kernels.reference.TOKENS", 3)
    monkeypatch.setattr("vortex_core.nf4.CHUNK", 700)


@pytest.mark.parametrize("shape", [(32, 8, 5, 7), (128, 32, 33, 17), (512, 32, 9, 8)])
@pytest.mark.parametrize("dtype", TYPES)
def test_group_norm_by_strips(fused, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_group_norm(fused, shape, dtype)


@pytest.mark.parametrize("shape", [(32, 8, 5, 7), (24, 12, 6, 9), (128, 32, 33, 17)])
@pytest.mark.parametrize("dtype", TYPES)
def test_group_norm_without_triton(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_group_norm(reference, shape, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_group_norm_in_chunks(small_chunks: None, dtype: torch.dtype) -> None:
    check_group_norm(reference, (32, 8, 5, 7), dtype)


def check_group_norm(kernels: Kernels, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    channels, groups, height, width = shape
    x = picture(1, channels, height, width, dtype=dtype) + 3
    weight, bias = draw(2, channels, dtype=dtype)
    norm = F.silu(F.group_norm(x.float(), groups, weight.float(), bias.float(), reference.EPSILON)).to(dtype)
    expected = F.pad(norm, (1, 1, 1, 1))
    windows = strips(x, 2)
    room = sum(most_parts(channels, window.strip.shape[2], width) for window in windows)
    moments = no_moments(groups, room)
    for window in windows:
        kernels.group_moments(window.strip, moments)
    assert moments.values[:, :, : moments.parts].isfinite().all()
    assert moments.values[:, :, moments.parts :].isnan().all()
    made = terms(kernels, moments, weight, bias)
    for i, window in enumerate(windows):
        ours, theirs = beside(window), expected[:, :, 2 * i : 2 * i + 4]
        kernels.norm_silu(window, *made, ours)
        if kernels is not reference or dtype == torch.float32:
            assert_same(ScaledTensor(ours), ScaledTensor(theirs))
        else:  # rounds once more, before SiLU, to spare a map in fp32
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.005 if GPU else 0.002)


@pytest.mark.parametrize("parts", [1, 3, 1500])
def test_norm_terms_join_any_number_of_parts(fused, parts: int) -> None:
    moments = no_moments(8, parts + 7)  # with room behind, that nobody reads
    moments.values[:, :, :parts] = torch.stack((draw(8, parts).abs() + 1, 5 + draw(8, parts), draw(8, parts).abs()))
    moments.values[0, :, 1:2] = 0  # a part may be empty
    if parts == 1:
        moments.values[0, :, 1:2] = torch.nan
    moments.take(parts)
    weight, bias = draw(2, 32)
    ours, theirs = (terms(kernels, moments, weight, bias) for kernels in (fused, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_moments_have_a_capacity() -> None:
    moments = no_moments(4, 5)
    assert [moments.take(2), moments.take(3)] == [0, 2]
    with pytest.raises(ValueError, match="6 parts do not fit into 5"):
        moments.take(1)
    assert moments.parts == 5


@pytest.mark.parametrize("height", [1, 3, 20])
def test_borders_are_neighbours_or_zeros(fused, height: int) -> None:
    check_borders(fused, height)


@pytest.mark.parametrize("height", [1, 3, 20])
def test_borders_without_triton(height: int) -> None:
    check_borders(reference, height)


def check_borders(kernels: Kernels, height: int) -> None:
    x = picture(1, 32, 7, 5, dtype=HALF)
    expected = F.pad(x, (1, 1, 1, 1))
    for i, window in enumerate(strips(x, height)):
        ours = beside(window)
        kernels.bordered(window, ours)
        assert torch.equal(ours, expected[:, :, i * height : i * height + height + 2])


@pytest.fixture(params=[True, False], ids=["copied", "loaded"])
def copies(fused, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tiles come by the bulk copy engine, or, as on cards that have none, by loads."""
    known = card(DEVICE)
    if request.param and not known.copies:
        pytest.skip("NOT RUN, the copy engine: this card has none")
    for name in ("convolution", "decoder_attention", "fp8_attention"):
        module = sys.modules[f"vortex_core.kernels.{name}"]
        monkeypatch.setattr(module, "card", lambda device: known._replace(copies=request.param))
    return bool(request.param)


SMALL, WIDE = [(32, 16, 5, 7), (32, 3, 20, 9)], [(64, 128, 11, 13), (128, 256, 6, 30), (512, 512, 64, 64)]
CONVOLUTIONS = list(product(SMALL + WIDE * GPU, TYPES))
if not GPU:  # several tiles of pixels, and several of channels each way: the interpreter takes seconds for each
    CONVOLUTIONS += [((64, 32, 11, 13), HALF), ((64, 128, 3, 10), torch.float32)]
KINDS = ["", "onto", "doubled"]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), CONVOLUTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions(fused, copies: bool, shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str) -> None:
    check_convolution(fused, shape, dtype, kind)


@pytest.mark.parametrize("shape", [(32, 16, 5, 7), (24, 3, 20, 9), (24, 36, 6, 30)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_in_chunks(
    small_chunks: None, shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str
) -> None:
    check_convolution(reference, shape, dtype, kind)


def check_convolution(kernels: Kernels, shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str) -> None:
    channels, wide, height, width = shape
    x = picture(1, channels, height + 2, width + 2, dtype=dtype)
    weight = (draw(wide, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = draw(wide, dtype=dtype)
    groups = 0 if wide <= 3 else 8 if wide % 8 == 0 else 4
    doubled = kind == "doubled"
    size = (1, wide, 2 * height, 2 * width) if doubled else (1, wide, height, width)
    skip = picture(*size, dtype=dtype) if kind == "onto" else None
    room = 3 + most_parts(*size[1:], doubled=doubled)

    def convolve(kernels: Kernels) -> tuple[Tensor, Moments | None]:
        out = unwritten(*size, dtype=dtype) if skip is None else skip.clone()
        moments = no_moments(groups, room) if groups else None
        if moments is not None:
            moments.values[:, :, : moments.take(3) + 3] = 0  # those of strips above
        if doubled:
            taps = torch.full((4 * wide, 4 * channels), torch.nan, device=DEVICE, dtype=dtype)
            kernels.corner_taps(weight, taps)
            kernels.convolve_doubled(x, taps, bias, out, moments)
        else:
            kernels.convolve(x, weight, bias, out, moments, add=skip is not None)
        return out, moments

    given = x.double()
    if doubled:
        given = F.interpolate(given, scale_factor=2.0)[:, :, 1:-1, 1:-1]
    exact = F.conv2d(given, weight.double(), bias.double()) + (0 if skip is None else skip.double())
    eager, _ = convolve(reference)
    ours, moments = convolve(kernels)
    assert ours.isfinite().all()
    again, _ = convolve(kernels)
    assert torch.equal(ours, again)  # a race would show
    rounding = max(torch.finfo(dtype).eps, 1e-6)  # of sums of thousands, in 32 bits, and of summed taps
    off, theirs = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, eager))
    assert off <= max(1.05 * theirs, rounding)
    assert float((ours.double() - exact).abs().max()) < 20 * rounding * float(exact.abs().max())
    if moments is not None:
        assert moments.values[:, :, : moments.parts].isfinite().all()
        assert moments.values[:, :, moments.parts :].isnan().all()
        whole = no_moments(groups, room)
        reference.group_moments(ours, whole)
        weight, bias = draw(2, wide)
        found, expected = terms(kernels, moments, weight, bias), terms(reference, whole, weight, bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 33, 200])
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_of_one_wide_head(fused, copies: bool, tokens: int, dtype: torch.dtype) -> None:
    q, k, v = draw(3, tokens, 512 if GPU else 128).to(dtype)
    exact = F.scaled_dot_product_attention(2 * q.double()[None, None], k.double()[None, None], v.double()[None, None])
    ours, eager = torch.full((2, *q.shape), torch.nan, device=DEVICE, dtype=dtype)
    for kernels, out in ((fused, ours), (reference, eager)):
        kernels.attend(2 * q, k, v, out)
    off, theirs = (float((y.double() - exact).norm() / exact.norm()) for y in (ours, eager))
    assert off <= max(1.5 * theirs, 1e-6)


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch goes through a few at a time, so that what it allocates has a bound."""
    y, (gate, shift, scale) = part(2, 5, 192, HALF)[0], draw(3, 192, dtype=HALF)
    qkv, norms, angle = draw(2, 7, 3, 2, 128, dtype=HALF), draw(2, 128, dtype=HALF), draw(7, 64)
    weight = nf4.quantize_reference(draw(37, 192))
    x, found = part(2, 5, 192, HALF)[0], []
    for tokens, values in ((1024, 2**23), (3, 700)):
        monkeypatch.setattr("vortex_core.kernels.reference.TOKENS", tokens)
        monkeypatch.setattr("vortex_core.nf4.CHUNK", values)
        stream, heads, out = x.clone(), qkv.clone(), empty(2, 5, 192, HALF)
        decoded = torch.full((37, 192), torch.nan, device=DEVICE, dtype=HALF)
        reference.residual_modulate(stream, y, gate, shift, scale, out)
        reference.rotate(heads, *norms, angle.cos(), angle.sin())
        assert nf4.dequantize(weight, HALF, decoded) is decoded
        found.append((stream, heads, out.values, decoded, nf4.dequantize(weight, torch.float32)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


class Peak(TorchDispatchMode):
    """The bytes that operations made and that are still there, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._there = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self._there = {key: ref for key, ref in self._there.items() if not ref[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in given:
                    self._there[ref.cdata] = (ref, tensor.untyped_storage().nbytes())
        self.most = max(self.most, sum(size for _, size in self._there.values()))
        return result


def peak(call: Callable[[], object]) -> int:
    with torch.no_grad(), Peak() as mode:
        call()
    return mode.most


def empty_on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4352), (3, 900)])
def test_a_step_without_triton_takes_what_it_says(dtype: torch.dtype, batch: int, tokens: int) -> None:
    x, y, values = (empty_on_meta(batch, tokens, 3072, dtype=dtype) for _ in range(3))
    gate, shift, scale = empty_on_meta(3, 3072, dtype=dtype)
    qkv, norms = empty_on_meta(batch, tokens, 3, 24, 128, dtype=dtype), empty_on_meta(2, 128, dtype=dtype)
    cos, sin = empty_on_meta(2, tokens, 64, dtype=torch.float32)
    for call in (
        lambda: reference.modulate(x, shift, scale, ScaledTensor(values)),
        lambda: reference.residual_modulate(x, y, gate, shift, scale, ScaledTensor(values)),
        lambda: reference.rotate(qkv, *norms, cos, sin),
    ):
        assert reference.step_bytes(3072) / 4 < peak(call) <= reference.step_bytes(3072)
    # the table is made on a device by copying, which `meta` cannot
    packed, absmax = torch.zeros(3 * 2**14, 512, dtype=torch.uint8), torch.zeros(3 * 2**14, 16)
    out = torch.empty(3 * 2**14, 1024, dtype=dtype)
    assert peak(lambda: reference.dequantize(packed, absmax, out)) <= nf4.DEQUANTIZE_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inside", "outside", "height", "width"), [(512, 256, 300, 512), (128, 3, 200, 2048)])
def test_strips_without_triton_take_what_they_say(
    dtype: torch.dtype, inside: int, outside: int, height: int, width: int
) -> None:
    def empty_map(channels: int, height: int, width: int) -> Tensor:
        return empty_on_meta(1, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)

    x, out = empty_map(inside, height, width), empty_map(outside, height, width)
    bordered, weight = empty_map(inside, height + 2, width + 2), empty_on_meta(outside, inside, 3, 3, dtype=dtype)
    doubled, taps = empty_map(inside, 2 * height, 2 * width), empty_on_meta(4 * inside, 4 * inside, dtype=dtype)
    scale, shift = empty_on_meta(2, inside, dtype=torch.float32)
    moments = Moments(empty_on_meta(3, 1, 4000, dtype=torch.float32))
    bias = empty_on_meta(outside, dtype=dtype)
    limit = reference.strip_bytes(inside, outside, width, dtype.itemsize)
    assert peak(lambda: reference.group_moments(x, moments)) <= limit
    assert peak(lambda: reference.norm_silu(Window(None, x, None), scale, shift, bordered)) == 0
    assert peak(lambda: reference.convolve(bordered, weight, bias, out, moments, add=True)) <= limit
    limit = reference.strip_bytes(inside, inside, width, dtype.itemsize, doubled=True)
    call = lambda: reference.convolve_doubled(bordered, taps, scale.to(dtype), doubled, moments)  # noqa: E731
    assert limit / 2 < peak(call) <= limit


def test_every_launch_is_on_the_device_of_its_tensors(fused, monkeypatch: pytest.MonkeyPatch) -> None:
    from vortex_core.kernels.launch import on_device

    class Device:
        """Stands for `torch.cuda.device`."""

        current, switched = 0, []

        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.switched.append(self.index)
            Device.before, Device.current = Device.current, self.index

        def __exit__(self, *raised: object) -> None:
            Device.current = Device.before

    class OnCard(Tensor):
        """Says that it lies on a card."""

        index = 0
        is_cuda = property(lambda self: True)
        device = property(lambda self: torch.device("cuda", self.index))

        def get_device(self) -> int:
            return self.index

    def on_card(index: int) -> Tensor:
        tensor = torch.zeros(1).as_subclass(OnCard)
        tensor.index = index
        return tensor

    monkeypatch.setattr("torch.cuda.current_device", lambda: Device.current)
    monkeypatch.setattr("torch.cuda.device", Device)
    seen = []
    launch = on_device(lambda *args, **kwargs: seen.append(Device.current))
    launch(on_card(0))
    launch(torch.zeros(1))  # where Triton interprets
    launch(1.0)
    assert seen == [0, 0, 0]
    assert Device.switched == []
    launch(on_card(2), on_card(0))
    launch(Window(None, on_card(1), None), torch.zeros(1))
    launch(None, x=ScaledTensor(on_card(3)))
    assert seen == [0, 0, 0, 2, 1, 3]
    assert Device.current == 0
    names = [name for name, value in vars(Kernels).items() if callable(value) and not name.startswith("_")]
    assert all(hasattr(getattr(fused, name), "__wrapped__") for name in names)


@pytest.mark.gpu
def test_fused_kernels_allocate_nothing() -> None:
    fused = pytest.importorskip("vortex_core.kernels.fused")
    x, out = (picture(1, 128, size, size, dtype=HALF) for size in (34, 32))
    weight, taps = picture(128, 128, 3, 3, dtype=HALF), draw(512, 512, dtype=HALF)
    doubled, moments, made = picture(1, 128, 64, 64, dtype=HALF), no_moments(32, 2000), draw(2, 128)
    tokens = draw(4, 900, 128, dtype=HALF)

    def run() -> None:
        moments.parts = 0
        fused.group_moments(out, moments)
        fused.norm_terms(moments, weight[0, :, 0, 0], weight[1, :, 0, 0], 1e-6, made)
        fused.norm_silu(Window(None, out, None), *made, x)
        fused.bordered(Window(None, out, None), x)
        fused.convolve(x, weight, weight[0, :, 0, 0], out, moments, add=True)
        fused.corner_taps(weight, taps)
        fused.convolve_doubled(x, taps, weight[0, :, 0, 0], doubled, moments)
        fused.attend(*tokens)

    run()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_choice_of_kernels_says_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    assert choose_kernels(torch.device("cpu")) is reference
    assert "fused ones declined on cpu: they need CUDA, not cpu" in caplog.text
    cuda = torch.device("cuda", 0)
    for capability, words in (((7, 5), "compute capability 8.0"), ((8, 6), "Triton does not import")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setitem(sys.modules, "triton", None)
        assert choose_kernels(cuda) is reference
        assert words in caplog.text


def test_fast_is_declined_where_there_is_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8_declined(torch.device("cpu")) == "they need CUDA, not cpu"
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("vortex_core.quant.linear.fused_declined", lambda device: None)
    monkeypatch.setattr("vortex_core.quant.linear._fp8_broken", lambda device: None)
    for capability, declined in (((8, 6), "8.9, and this card has 8.6"), ((8, 9), None), ((9, 0), None)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, capability=capability: capability)
        assert declined is None if (why := fp8_declined(cuda)) is None else declined in why


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "count"), [(1280, 2), (4352, 24), (16640, 2)])
def test_sums_over_many_tokens_lose_nothing(tokens: int, count: int) -> None:
    """What fp8 products are added up in is short; values with a mean would come out too small."""
    fused = pytest.importorskip("vortex_core.kernels.fused")
    qkv = draw_heads(1, tokens, count)
    qkv[:, :, 2] += draw(count, 128)
    heads, still = empty_heads(qkv), torch.zeros(tokens, 64, device=DEVICE)
    fused.pack_heads(qkv, [torch.ones_like(qkv[0, 0, 0, 0])] * 4, 0, still + 1, still, heads)
    fused.attend_heads(heads, qkv[:, :, 0])
    q, k, v = (x.float().transpose(1, 2) for x in queries_keys_values(heads))
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert float((qkv[:, :, 0] * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.005)


def test_attention_is_in_fp8_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    monkeypatch.setattr("vortex_core.kernels._heads_broken", lambda device: None)
    for capability, runs in (((8, 9), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, capability=capability: capability)
        assert attends_in_fp8(torch.device("cuda", 0)) is runs
    assert "alone, and this card has 8.9" in caplog.text
    assert "alone, and this card has 12.0" in caplog.text


@pytest.mark.gpu
def test_attention_in_fp8_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("vortex_core.kernels.fused")
    assert _heads_broken.__wrapped__(DEVICE) is None
    monkeypatch.setattr(fused, "attend_heads", lambda heads, out: out.zero_())
    assert "is wrong on a sample" in _heads_broken.__wrapped__(DEVICE)
    monkeypatch.setattr(fused, "attend_heads", lambda heads, out: 1 / 0)
    assert "(division by zero)" in _heads_broken.__wrapped__(DEVICE)


def test_a_sample_product_in_fp8_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fp8_broken.__wrapped__(torch.device("cpu")) is None

    def fail(*arguments: object) -> None:
        raise RuntimeError("rowwise scaling is not supported\nmore")

    monkeypatch.setattr("vortex_core.quant.linear.product", fail)
    assert "does not: rowwise scaling is not supported" in _fp8_broken.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr("vortex_core.quant.linear.product", lambda *arguments: arguments[-1].zero_())
    assert _fp8_broken.__wrapped__(torch.device("cpu")) == "a sample product is wrong"
