"""Attention in fp8: how heads are packed, how near it comes, and where it is used."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from kernel_parts import DEVICE, EIGHT, GPU, HALF, draw
from torch import Tensor

from vortex_core.kernels import Heads, _heads_broken, attends_in_fp8, reference
from vortex_core.kernels.scaled_tensor import FP8, FP8_MAX, TILE, empty_heads

pytestmark = pytest.mark.usefixtures("seeded")


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
    monkeypatch.setattr("vortex_core.kernels.fused_declined", lambda device: declined)
    declined = None
    for capability, runs in (((8, 9), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, capability=capability: capability)
        assert attends_in_fp8(torch.device("cuda", 0)) is runs
    assert "alone, and this card has 8.9" in caplog.text
    assert "alone, and this card has 12.0" in caplog.text
    declined = "Triton is not installed"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert not attends_in_fp8(torch.device("cuda", 0))
    assert "fp8 declined: Triton is not installed" in caplog.text


@pytest.mark.gpu
def test_attention_in_fp8_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("vortex_core.kernels.fused")
    assert _heads_broken.__wrapped__(DEVICE) is None
    monkeypatch.setattr(fused, "attend_heads", lambda heads, out: out.zero_())
    assert "is wrong on a sample" in _heads_broken.__wrapped__(DEVICE)
    monkeypatch.setattr(fused, "attend_heads", lambda heads, out: 1 / 0)
    assert "(division by zero)" in _heads_broken.__wrapped__(DEVICE)
