"""The decoder's kernels against their plain torch references: norms, borders, convolutions, one wide head."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_parts import DEVICE, GPU, HALF, TYPES, assert_same, draw, no_moments, picture
from torch import Tensor

from vortex_core.kernels import Kernels, Moments, ScaledTensor, Window, most_parts, reference

pytestmark = pytest.mark.usefixtures("seeded")


def unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """A map full of NaN."""
    return torch.full(shape, torch.nan, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


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
