"""Row kernels: one program for each token, which reads and writes device memory once.

A row stays in registers: the fp8 scale needs the token's largest value, which so costs no second pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import early, follow
from .reference import EPSILON
from .scaled_tensor import FP8_MAX, SMALLEST, ScaledTensor

_EPSILON = tl.constexpr(EPSILON)
_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def _row(pointer, stride_b, stride_t, T):
    token = tl.program_id(0).to(tl.int64)
    return pointer + token // T * stride_b + token % T * stride_t


@triton.jit
def _write(y, out, out_b, out_t, scale, scale_b, scale_t, T, column, mask, QUANTIZE: tl.constexpr):
    if QUANTIZE:
        unit = tl.maximum(tl.max(tl.abs(y), 0), _SMALLEST) / _FP8_MAX
        tl.store(_row(scale, scale_b, scale_t, T), unit)
        y *= 1 / unit
    tl.store(_row(out, out_b, out_t, T) + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_b", "T"])
def _modulate(
    x, x_b, x_t, y, y_b, y_t, gate, shift, scale, out, out_b, out_t, out_scale, scale_b, scale_t, T,
    D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    column = tl.arange(0, BLOCK)
    mask = column < D
    x = _row(x, x_b, x_t, T)
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        branch = tl.load(_row(y, y_b, y_t, T) + column, mask=mask, other=0.0).to(tl.float32)
        value += branch * tl.load(gate + column, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    value = tl.where(mask, value - tl.sum(value, 0) / D, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / D + _EPSILON)
    value *= 1 + tl.load(scale + column, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(shift + column, mask=mask, other=0.0).to(tl.float32)
    _write(value, out, out_b, out_t, out_scale, scale_b, scale_t, T, column, mask, QUANTIZE)


@triton.jit(do_not_specialize=["scale_b", "T"])
def _gelu(
    before, before_b, before_t, x, x_b, x_t, out, out_b, out_t, out_scale, scale_b, scale_t, T,
    A: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    column = tl.arange(0, BLOCK)
    value = tl.load(_row(x, x_b, x_t, T) + column - A, mask=(column >= A) & (column < A + W), other=0.0)
    value = value.to(tl.float32)
    if GELU:
        # x * (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)), which keeps small results exact to rounding
        u = value * (0.7978845608028654 + 0.035677408136300125 * value * value)
        value = value / (1 + tl.exp2(-2.8853900817779268 * u))
    if A > 0:
        first = tl.load(_row(before, before_b, before_t, T) + column, mask=column < A, other=0.0)
        value = tl.where(column < A, first.to(tl.float32), value)
    _write(value, out, out_b, out_t, out_scale, scale_b, scale_t, T, column, column < A + W, True)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.modulate`."""
    _launch_modulate(x, None, None, shift, scale, out)


def residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.residual_modulate`."""
    _launch_modulate(x, y, gate, shift, scale, out)


def gelu(x: Tensor, out: ScaledTensor, before: Tensor | None = None) -> None:
    """See `reference.gelu`."""
    _launch_gelu(x, out, before, gelu=True)


def quantize(x: Tensor, out: ScaledTensor) -> None:
    """See `reference.quantize`."""
    _launch_gelu(x, out, None, gelu=False)


def _launch_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, out: ScaledTensor
) -> None:
    batch, tokens, width = x.shape
    _modulate[(batch * tokens,)](
        *_strided(x), *_strided(y), gate, shift, scale, *_strided(out.values), *_strided(out.scale), tokens,
        D=width, BLOCK=triton.next_power_of_2(width), RESIDUAL=y is not None, QUANTIZE=out.scale is not None,
        num_warps=4, **early(out.values),
    )  # fmt: skip


def _launch_gelu(x: Tensor, out: ScaledTensor, before: Tensor | None, *, gelu: bool) -> None:
    batch, tokens, width = x.shape
    first = 0 if before is None else before.shape[2]
    block = triton.next_power_of_2(first + width)
    _gelu[(batch * tokens,)](
        *_strided(before), *_strided(x), *_strided(out.values), *_strided(out.scale), tokens,
        A=first, W=width, BLOCK=block, GELU=gelu,
        num_warps=4 if block <= 4096 else 8 if before is None else 16, **early(out.values),
    )  # fmt: skip


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))
