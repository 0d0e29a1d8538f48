"""Attention in fp8: queries, keys and values are rotated and quantized in one pass, and both products run in 8 bits.

Scales cost nothing inside the loop: a query's and a key tile's are folded into the softmax's own multiplication, a
value tile's into the rescaling of what was summed so far. Softmax statistics and sums are fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operand import FP8, FP8_MAX, SMALLEST
from .reference import EPSILON

_EPSILON = tl.constexpr(EPSILON)
_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)
TILE = 128  # tokens that share a scale of keys and of values
LOG2_E = 1.4426950408889634


class Heads(NamedTuple):
    """q, k and v in fp8, tokens padded with zeros to whole tiles.

    `q`, `k` `[B, H, L, C]`; `v` `[B, H, C, L]`, as the tensor cores want it; scales fp32: `q_scale` `[B, H, L]`,
    `k_scale` and `v_scale` `[B, H, L / TILE]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


@triton.jit
def _rms_rope(x, norm, cos, sin, token, mask, T: tl.constexpr, C: tl.constexpr):
    channel = tl.arange(0, C)
    x *= tl.rsqrt(tl.sum(x * x, 1) / C + _EPSILON)[:, None]
    x *= tl.load(norm + channel).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(x, [T, C // 2, 2]))
    pair = token[:, None] * (C // 2) + tl.arange(0, C // 2)[None, :]
    c = tl.load(cos + pair, mask=mask[:, None], other=0.0)
    s = tl.load(sin + pair, mask=mask[:, None], other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [T, C])


@triton.jit
def _quantize_heads(
    qkv, stride_b, stride_t, query_norm, key_norm, cos, sin, q, k, v, q_scale, k_scale, v_scale, tokens, padded,
    H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tile * TILE + tl.arange(0, TILE)
    mask = token < tokens
    channel = tl.arange(0, C)
    row = qkv + batch.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_t + channel[None, :] + head * C
    plane = batch * H + head
    place = (plane * padded + token).to(tl.int64)[:, None] * C + channel[None, :]

    x = tl.load(row, mask=mask[:, None], other=0.0).to(tl.float32)
    x = _rms_rope(x, query_norm, cos, sin, token, mask, TILE, C)
    unit = tl.maximum(tl.max(tl.abs(x), 1), _SMALLEST) / _FP8_MAX
    tl.store(q_scale + plane * padded + token, unit)
    tl.store(q + place, (x * (1 / unit)[:, None]).to(q.dtype.element_ty))

    x = tl.load(row + H * C, mask=mask[:, None], other=0.0).to(tl.float32)
    x = _rms_rope(x, key_norm, cos, sin, token, mask, TILE, C)
    one = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST) / _FP8_MAX
    tl.store(k_scale + plane * (padded // TILE) + tile, one)
    tl.store(k + place, (x * (1 / one)).to(k.dtype.element_ty))

    x = tl.load(row + 2 * H * C, mask=mask[:, None], other=0.0).to(tl.float32)
    one = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST) / _FP8_MAX
    tl.store(v_scale + plane * (padded // TILE) + tile, one)
    place = (plane * C + channel).to(tl.int64)[:, None] * padded + token[None, :]
    tl.store(v + place, tl.trans((x * (1 / one)).to(v.dtype.element_ty)))


@triton.jit
def _attention(
    q, k, v, q_scale, k_scale, v_scale, out, out_b, out_t, tokens, padded, softmax_scale,
    H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, key = tl.arange(0, C), tl.arange(0, TILE)
    base = plane.to(tl.int64) * padded * C
    queries = tl.load(q + base + row[:, None] * C + channel[None, :], mask=(row < padded)[:, None], other=0.0)
    unit = tl.load(q_scale + plane * padded + row, mask=row < padded, other=0.0) * softmax_scale
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK, C], tl.float32)
    tiles = padded // TILE
    previous = tl.load(v_scale + plane * tiles)
    for tile in range(tiles):
        keys = tl.load(k + base + (tile * TILE + key)[None, :] * C + channel[:, None])
        scores = tl.dot(queries, keys)
        if MASKED:
            scores = tl.where((tile * TILE + key < tokens)[None, :], scores, float("-inf"))
        scale = unit * tl.load(k_scale + plane * tiles + tile)
        now = tl.maximum(highest, tl.max(scores, 1) * scale)
        # 2**8 times as large: the weights then use fp8's range, and the division at the end takes it out again
        weights = tl.exp2(scores * scale[:, None] - (now - 8)[:, None])
        fade = tl.exp2(highest - now)
        total = total * fade + tl.sum(weights, 1)
        value = tl.load(v_scale + plane * tiles + tile)
        summed = summed * (fade * (previous / value))[:, None]
        values = tl.load(v + base + channel[None, :] * padded + (tile * TILE + key)[:, None])
        summed = tl.dot(weights.to(v.dtype.element_ty), values, summed)
        highest, previous = now, value
    summed = summed * (previous / total)[:, None]
    out += (plane // H).to(tl.int64) * out_b + (plane % H) * C
    place = out + row.to(tl.int64)[:, None] * out_t + channel[None, :]
    tl.store(place, summed.to(out.dtype.element_ty), mask=(row < tokens)[:, None])


def allocate(batch: int, heads: int, tokens: int, channels: int, device: torch.device) -> Heads:
    padded = triton.cdiv(tokens, TILE) * TILE
    def fp8(*shape): return torch.empty(shape, dtype=FP8, device=device)
    def fp32(*shape): return torch.empty(shape, dtype=torch.float32, device=device)
    return Heads(fp8(batch, heads, padded, channels), fp8(batch, heads, padded, channels), fp8(batch, heads, channels, padded),
                 fp32(batch, heads, padded), fp32(batch, heads, padded // TILE), fp32(batch, heads, padded // TILE))


def quantize_heads(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, heads: Heads
) -> None:
    """`rotate` of q and k, and all three to fp8. `qkv` `[B, L, 3, H, C]`."""
    batch, tokens, _, count, channels = qkv.shape
    padded = heads.q.shape[2]
    _quantize_heads[(padded // TILE, count, batch)](
        qkv, qkv.stride(0), qkv.stride(1), query_norm, key_norm, cos, sin, *heads, tokens, padded,
        H=count, C=channels, TILE=TILE, num_warps=8,
    )  # fmt: skip


def attention(heads: Heads, out: Tensor, *, block: int = 128, warps: int = 8, stages: int = 3) -> None:
    """Softmax attention into `out` `[B, L, D]`."""
    batch, tokens, _ = out.shape
    _, count, padded, channels = heads.q.shape
    _attention[(triton.cdiv(tokens, block), batch * count)](
        *heads, out, out.stride(0), out.stride(1), tokens, padded, channels**-0.5 * LOG2_E,
        H=count, C=channels, BLOCK=block, TILE=TILE, MASKED=tokens % TILE != 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
