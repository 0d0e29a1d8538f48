"""RMS norm and rotary embedding of queries and keys, in place where the products wrote them.

One program takes q or k of one token, all heads: they are contiguous in memory, and share one read of cos and sin.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .reference import EPSILON

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def rotated(x, weight, cos, sin, position, C: tl.constexpr, BLOCK_H: tl.constexpr):
    """The heads of one token, fp32 `[BLOCK_H, C]`, after norm and rotation."""
    x *= tl.rsqrt(tl.sum(x * x, 1) / C + _EPSILON)[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(x, [BLOCK_H, C // 2, 2]))
    pair = position * (C // 2) + tl.arange(0, C // 2)
    c, s = tl.load(cos + pair)[None, :], tl.load(sin + pair)[None, :]
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_H, C])


@triton.jit(do_not_specialize=["T"])
def _rotate(
    qkv, stride_b, stride_t, query_norm, key_norm, cos, sin, T,
    H: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    norm = query_norm
    if tl.program_id(1) == 1:
        norm = key_norm
    head, channel = tl.arange(0, BLOCK_H), tl.arange(0, C)
    mask = (head < H)[:, None]
    place = qkv + token // T * stride_b + token % T * stride_t + tl.program_id(1) * (H * C)
    place += head[:, None] * C + channel[None, :]
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    x = rotated(x, tl.load(norm + channel).to(tl.float32), cos, sin, token % T, C, BLOCK_H)
    tl.store(place, x.to(qkv.dtype.element_ty), mask=mask)


def rotate(qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `reference.rotate`. `qkv[b, t]` and the tables are contiguous."""
    batch, tokens, _, heads, channels = qkv.shape
    _rotate[(batch * tokens, 2)](
        qkv, qkv.stride(0), qkv.stride(1), query_norm, key_norm, cos, sin, tokens,
        H=heads, C=channels, BLOCK_H=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
