"""The kernels in CUDA C against their plain torch references; on the CPU as cuda_on_cpu.py runs them."""

from __future__ import annotations

from itertools import product

import cuda_on_cpu
import pytest
import torch
from kernel_parts import DEVICE, GPU, HALF, TYPES, assert_same, draw, empty, no_moments, part, picture
from test_decoder_kernels import KINDS, SMALL, WIDE, check_borders, check_convolution, check_group_norm, terms

from vortex_core import nf4
from vortex_core.kernels import Kernels, ScaledTensor, most_parts, reference

pytestmark = pytest.mark.usefixtures("seeded")
ALL = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    from vortex_core.kernels import compiled

    cuda_on_cpu.use(monkeypatch)
    return compiled


@pytest.mark.parametrize("shape", [(1, 64), (37, 192), (130, 320)])
@pytest.mark.parametrize("dtype", ALL)
def test_decode_is_bit_exact(compiled: Kernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = nf4.quantize_reference(draw(*shape))
    ours = torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)
    compiled.dequantize(weight.packed, weight.absmax, ours)
    assert torch.equal(ours, nf4.dequantize(weight, dtype))


@pytest.mark.parametrize("width", [64, 100, 192, 3072, 25000])
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("residual", [False, True])
def test_modulate(compiled: Kernels, width: int, dtype: torch.dtype, residual: bool) -> None:
    x, again = part(2, 5, width, dtype)
    y, (gate, shift, scale) = part(2, 5, width, dtype)[0], draw(3, width, dtype=dtype)
    results = []
    for kernels, stream in ((compiled, x), (reference, again)):
        results.append(empty(2, 5, width, dtype))
        if residual:
            kernels.residual_modulate(stream, y, gate, shift, scale, results[-1])
        else:
            kernels.modulate(stream, shift, scale, results[-1])
    assert_same(ScaledTensor(x), ScaledTensor(again))
    assert_same(*results)


@pytest.mark.parametrize("width", [64, 100, 192, 3072, 25000])
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("terms", [(5.0, 1.5, 0.5), (1.0, 10.0, 1.0), (50.0, 1.0, 0.25)])
def test_guide(compiled: Kernels, width: int, dtype: torch.dtype, terms: tuple[float, float, float]) -> None:
    wanted, avoided = (part(2, 5, width, dtype)[0] for _ in range(2))
    wanted[0, 1], avoided[1, 2] = 0, 0
    given, results = torch.tensor(terms, device=DEVICE), []
    for kernels in (compiled, reference):
        results.append(empty(2, 5, width, dtype))
        kernels.guide(wanted, avoided, given, results[-1].values)
    assert_same(*results)


@pytest.mark.parametrize(("heads", "channels"), [(2, 128), (3, 16), (24, 128), (9, 72), (2, 30), (1, 256), (1, 512)])
@pytest.mark.parametrize("dtype", ALL)
def test_rotate_leaves_values_alone(compiled: Kernels, heads: int, channels: int, dtype: torch.dtype) -> None:
    qkv = draw(2, 7, 3, heads, channels, dtype=dtype)
    query_norm, key_norm = draw(2, channels, dtype=dtype)
    angle = draw(5, channels // 2)
    ours, expected = qkv.clone(), qkv.clone()
    for kernels, copy in ((compiled, ours), (reference, expected)):
        kernels.rotate(copy[:, 2:], query_norm, key_norm, angle.cos(), angle.sin())
    assert torch.equal(ours[:, :2], qkv[:, :2])
    assert torch.equal(ours[:, :, 2], qkv[:, :, 2])
    assert_same(ScaledTensor(ours), ScaledTensor(expected))


@pytest.mark.parametrize("shape", [(32, 8, 5, 7), (128, 32, 33, 17), (512, 32, 9, 8)])
@pytest.mark.parametrize("dtype", ALL)
def test_group_norm_by_strips(compiled: Kernels, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_group_norm(compiled, shape, dtype)


@pytest.mark.parametrize("shape", [(64, 8, 40, 31), (8, 1, 3, 700), (512, 32, 10, 10), (32, 32, 9, 61)])
def test_moments_of_a_map_in_many_parts(compiled: Kernels, shape: tuple[int, int, int, int]) -> None:
    channels, groups, height, width = shape
    x = picture(1, channels, height, width, dtype=torch.bfloat16) * 2 + 5
    room, weight, bias = most_parts(channels, height, width), *draw(2, channels)
    found = []
    for kernels in (compiled, reference):
        moments = no_moments(groups, room)
        kernels.group_moments(x, moments)
        found.append(terms(kernels, moments, weight, bias))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 3, 1500])
def test_norm_terms_join_any_number_of_parts(compiled: Kernels, parts: int) -> None:
    moments = no_moments(8, parts + 7)  # with room behind, that nobody reads
    moments.values[:, :, :parts] = torch.stack((draw(8, parts).abs() + 1, 5 + draw(8, parts), draw(8, parts).abs()))
    moments.take(parts)
    weight, bias = draw(2, 32)
    ours, theirs = (terms(kernels, moments, weight, bias) for kernels in (compiled, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("height", [1, 3, 20])
def test_borders_are_neighbours_or_zeros(compiled: Kernels, height: int) -> None:
    check_borders(compiled, height)


@pytest.mark.parametrize(("shape", "dtype"), list(product(SMALL + WIDE * GPU, TYPES)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [2**23, 700])
def test_convolutions(
    compiled: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    kind: str,
    chunk: int,
) -> None:
    monkeypatch.setattr("vortex_core.kernels.scaled_tensor.CHUNK", chunk)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the library convolves, and its choice differs
    check_convolution(compiled, shape, dtype, kind)


def test_what_is_meant_for_triton_alone_is_the_references(compiled: Kernels) -> None:
    """Nobody asks for it where Triton does not run; if somebody did, it would be right."""
    x = part(2, 3, 64, HALF)[0]
    shift, scale = draw(2, 64, dtype=HALF)
    weight = nf4.quantize_reference(draw(7, 64))
    rows, found = weight.absmax.amax(1), []
    for kernels in (compiled, reference):
        eight = empty(2, 3, 64, torch.float32, scaled=True)
        decoded = torch.full((7, 64), torch.nan, device=DEVICE)
        kernels.modulate(x, shift, scale, eight)
        kernels.dequantize(weight.packed, weight.absmax, decoded, rows)
        found.append((eight.values, eight.scale, decoded))
    assert all(map(torch.equal, *found))
