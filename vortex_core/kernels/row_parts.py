"""What the row kernels share, whatever they write: where a token's row lies, adaLN, and GELU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .reference import EPSILON

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def row_of(pointer, stride_b, stride_t, T):
    """The program's token in a matrix `[B, T, ...]`."""
    token = tl.program_id(0).to(tl.int64)
    return pointer + token // T * stride_b + token % T * stride_t


@triton.jit
def modulated(x, y, gate, shift, scale, column, mask, D: tl.constexpr, RESIDUAL: tl.constexpr):
    """The row `x` after adaLN, fp32, 0 where `mask` is; before it, `gate * y` is added to `x` in memory."""
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        branch = tl.load(y + column, mask=mask, other=0.0).to(tl.float32)
        value += branch * tl.load(gate + column, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    value = tl.where(mask, value - tl.sum(value, 0) / D, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / D + _EPSILON)
    value *= 1 + tl.load(scale + column, mask=mask, other=0.0).to(tl.float32)
    return value + tl.load(shift + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activated(x):
    """GELU (tanh form) of fp32 `x`."""
    # x * (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)), which keeps small results exact to rounding
    u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    return x / (1 + tl.exp2(-2.8853900817779268 * u))


@triton.jit
def activated_fast(x):
    """`activated`, with the card's own exponential and reciprocal: off by some 1e-7 of it."""
    u = x * (-2.302208198144325 - 0.10294324106922742 * x * x)
    # as one piece of assembly, since tl.exp2 and division guard against ranges that cannot occur here
    share = tl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=f,f", [u], tl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return x * share


def strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A matrix of tokens as kernels take it."""
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))
