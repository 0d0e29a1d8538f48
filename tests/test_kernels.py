"""The Triton kernels of a step against their plain torch references, and who gets which."""

from __future__ import annotations

import pytest
import torch
from kernel_parts import DEVICE, EIGHT, HALF, TYPES, assert_same, draw, empty, part
from torch import Tensor

from vortex_core import nf4
from vortex_core.kernels import Kernels, ScaledTensor, Window, reference
from vortex_core.kernels.scaled_tensor import FP8, FP8_MAX

pytestmark = pytest.mark.usefixtures("seeded")


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
    scale = torch.full(shape[:1], torch.nan, device=DEVICE)
    reference.row_scales(weight.packed, weight.absmax, scale, FP8)
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


@pytest.mark.parametrize("width", [64, 192, 3072])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("terms", [(5.0, 1.5, 0.5), (1.0, 10.0, 1.0), (50.0, 1.0, 0.25)])
def test_guide(fused, width: int, dtype: torch.dtype, terms: tuple[float, float, float]) -> None:
    wanted, avoided = (part(2, 5, width, dtype)[0] for _ in range(2))
    wanted[0, 1], avoided[1, 2] = 0, 0
    given, results = torch.tensor(terms, device=DEVICE), []
    for kernels in (fused, reference):
        results.append(empty(2, 5, width, dtype))
        kernels.guide(wanted, avoided, given, results[-1].values)
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
    names = [
        name for name, value in vars(Kernels).items() if callable(value) and name[0] != "_" and "bytes" not in name
    ]
    assert all(hasattr(getattr(fused, name), "__wrapped__") for name in names)
