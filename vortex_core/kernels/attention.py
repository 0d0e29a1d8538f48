"""Attention in fp8: queries, keys and values are rotated and quantized in one pass, and both products run in 8 bits.

Scales cost nothing inside the loop: a query's and a key tile's are folded into the softmax's own multiplication, a
value tile's into the rescaling of what was summed so far. Softmax statistics and sums are fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operand import FP8_MAX, SMALLEST, TILE, Heads
from .reference import EPSILON

log = logging.getLogger(__name__)

_EPSILON = tl.constexpr(EPSILON)
_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)
BLOCK, WARPS, STAGES = 64, 4, 3  # queries of a program: two programs share a multiprocessor
QUANTIZE_WARPS = 8
LOG2_E = 1.4426950408889634


@triton.jit
def _rms_rope(x, norm, other_norm, cos, sin, token, boundary, mask, TILE: tl.constexpr, C: tl.constexpr):
    channel = tl.arange(0, C)
    x *= tl.rsqrt(tl.sum(x * x, 1) / C + _EPSILON)[:, None]
    first, second = tl.load(norm + channel).to(tl.float32), tl.load(other_norm + channel).to(tl.float32)
    x *= tl.where((token < boundary)[:, None], first[None, :], second[None, :])
    even, odd = tl.split(tl.reshape(x, [TILE, C // 2, 2]))
    pair = token[:, None] * (C // 2) + tl.arange(0, C // 2)[None, :]
    c = tl.load(cos + pair, mask=mask[:, None], other=0.0)
    s = tl.load(sin + pair, mask=mask[:, None], other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [TILE, C])


@triton.jit
def _quantize_heads(
    qkv, stride_b, stride_t, norm_q, norm_k, other_q, other_k, boundary, cos, sin,
    q, k, v, q_scale, k_scale, v_scale, tokens, padded, H: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    batch, which = tl.program_id(2) // 3, tl.program_id(2) % 3
    token, channel = tile * TILE + tl.arange(0, TILE), tl.arange(0, C)
    mask = token < tokens
    row = qkv + batch.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_t + (which * H + head) * C
    x = tl.load(row + channel[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    plane = batch * H + head
    place = (plane * padded + token).to(tl.int64)[:, None] * C + channel[None, :]
    if which == 0:
        x = _rms_rope(x, norm_q, other_q, cos, sin, token, boundary, mask, TILE, C)
        units = tl.maximum(tl.max(tl.abs(x), 1), _SMALLEST) / _FP8_MAX
        tl.store(q_scale + plane * padded + token, units)
        tl.store(q + place, (x * (1 / units)[:, None]).to(q.dtype.element_ty))
    else:
        if which == 1:
            x = _rms_rope(x, norm_k, other_k, cos, sin, token, boundary, mask, TILE, C)
        unit = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), _SMALLEST) / _FP8_MAX
        small = (x * (1 / unit)).to(k.dtype.element_ty)
        if which == 1:
            tl.store(k_scale + plane * (padded // TILE) + tile, unit)
            tl.store(k + place, small)
        else:
            tl.store(v_scale + plane * (padded // TILE) + tile, unit)
            across = (plane * C + channel).to(tl.int64)[:, None] * padded + token[None, :]
            tl.store(v + across, tl.trans(small))


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


def quantize_heads(
    qkv: Tensor, norms: tuple[Tensor, Tensor, Tensor, Tensor], boundary: int, cos: Tensor, sin: Tensor, heads: Heads
) -> None:
    """See `reference.quantize_heads`."""
    batch, tokens, _, count, channels = qkv.shape
    padded = heads.q.shape[2]
    _quantize_heads[(padded // TILE, count, 3 * batch)](
        qkv, qkv.stride(0), qkv.stride(1), *norms, boundary, cos, sin, *heads, tokens, padded,
        H=count, C=channels, TILE=TILE, num_warps=QUANTIZE_WARPS,
    )  # fmt: skip


def attention(heads: Heads, out: Tensor) -> None:
    """See `reference.attention`. On Hopper by a kernel of its own, which is twice as fast."""
    hopper = _hopper(heads.q.device)
    (portable if hopper is None else hopper)(heads, out)


def portable(heads: Heads, out: Tensor) -> None:
    """`attention` for any card with fp8."""
    batch, tokens, _ = out.shape
    _, count, padded, channels = heads.q.shape
    _attention[(triton.cdiv(tokens, BLOCK), batch * count)](
        *heads, out, out.stride(0), out.stride(1), tokens, padded, channels**-0.5 * LOG2_E,
        H=count, C=channels, BLOCK=BLOCK, TILE=TILE, MASKED=tokens % TILE != 0, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@cache
def _hopper(device: torch.device) -> Callable[[Heads, Tensor], None] | None:
    """Hopper's attention, where it is one and this Triton has the language that kernel is written in."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from . import hopper
    except ImportError as error:
        log.warning("fp8 attention: the portable kernel; Hopper's declined: %s", error)
        return None
    return hopper.attention
