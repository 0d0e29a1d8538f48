"""Row kernels: one program for each token, which reads and writes device memory once.

A row stays in registers: the fp8 scale needs the token's largest value, which so costs no second pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rotation
from .launch import early, follow
from .reference import EPSILON
from .rotated_decode import rounded
from .scaled_tensor import FP8_MAX, SMALLEST, ScaledTensor

_EPSILON = tl.constexpr(EPSILON)
_FP8_MAX = tl.constexpr(FP8_MAX)
_INT8_MAX = tl.constexpr(rotation.INT8_MAX)
_HALF = tl.constexpr(rotation.HALF)
_SMALLEST = tl.constexpr(SMALLEST)
FEWEST = 16  # rows that a product takes


@triton.jit
def _row(pointer, stride_b, stride_t, T):
    token = tl.program_id(0).to(tl.int64)
    return pointer + token // T * stride_b + token % T * stride_t


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _write_rotated(y, table, out, scale, W: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """The row `y`, of which W values count and the others are 0, in int8. As in `rotated_decode`."""
    BLOCKS: tl.constexpr = y.numel // (PARTS * _HALF)
    index = tl.arange(0, _HALF)
    table = tl.load(table + index[:, None] * _HALF + index[None, :])
    if PARTS == 2:
        y = tl.permute(tl.reshape(y, [BLOCKS, 2, _HALF]), [0, 2, 1])
        first, second = tl.split(y)
        even = tl.dot(first, table, input_precision="ieee")
        odd = tl.dot(second, table, input_precision="ieee")
        first, second = even + odd, even - odd
        largest = _larger(tl.abs(first), tl.abs(second))
    else:
        first = tl.dot(tl.reshape(y, [BLOCKS, _HALF]), table, input_precision="ieee")
        largest = tl.abs(first)
    # NaN in a row must show, and would not in integers: its scale is NaN
    largest = _larger(tl.reduce(tl.reduce(largest, 1, _larger), 0, _larger), _SMALLEST)
    tl.store(scale, largest * UNIT)
    factor = _INT8_MAX / largest
    block = tl.arange(0, BLOCKS)[:, None]
    place, mask = out + block * (PARTS * _HALF) + index[None, :], block < W // (PARTS * _HALF)
    tl.store(place, rounded(first * factor), mask=mask)
    if PARTS == 2:
        tl.store(place + _HALF, rounded(second * factor), mask=mask)


@triton.jit
def _write(
    y, out, out_b, out_t, scale, scale_b, scale_t, T, column, mask, table, KIND,
    W: tl.constexpr, QUANTIZE: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    if PARTS > 0:
        out, scale = _row(out, out_b, out_t, T), _row(scale, scale_b, scale_t, T)
        _write_rotated(y.to(KIND), table, out, scale, W, PARTS, UNIT)
    else:
        if QUANTIZE:
            unit = tl.maximum(tl.max(tl.abs(y), 0), _SMALLEST) / _FP8_MAX
            tl.store(_row(scale, scale_b, scale_t, T), unit)
            y *= 1 / unit
        tl.store(_row(out, out_b, out_t, T) + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_b", "T"])
def _modulate(
    x, x_b, x_t, y, y_b, y_t, gate, shift, scale, out, out_b, out_t, out_scale, scale_b, scale_t, T, table,
    D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr,
    PARTS: tl.constexpr, UNIT: tl.constexpr, EARLY: tl.constexpr,
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
    _write(
        value, out, out_b, out_t, out_scale, scale_b, scale_t, T, column, mask, table, x.dtype.element_ty,
        D, QUANTIZE, PARTS, UNIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale_b", "T"])
def _gelu(
    before, before_b, before_t, x, x_b, x_t, out, out_b, out_t, out_scale, scale_b, scale_t, T, table,
    A: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr,
    PARTS: tl.constexpr, UNIT: tl.constexpr, EARLY: tl.constexpr,
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
    _write(
        value, out, out_b, out_t, out_scale, scale_b, scale_t, T, column, column < A + W, table, x.dtype.element_ty,
        A + W, True, PARTS, UNIT,
    )  # fmt: skip


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
        **_written(out, x), D=width, RESIDUAL=y is not None, QUANTIZE=out.scale is not None,
        num_warps=4, **early(out.values),
    )  # fmt: skip


def _launch_gelu(x: Tensor, out: ScaledTensor, before: Tensor | None, *, gelu: bool) -> None:
    batch, tokens, width = x.shape
    first = 0 if before is None else before.shape[2]
    written = _written(out, x)
    block = written["BLOCK"]
    _gelu[(batch * tokens,)](
        *_strided(before), *_strided(x), *_strided(out.values), *_strided(out.scale), tokens,
        **written, A=first, W=width, GELU=gelu,
        num_warps=4 if block <= 4096 else 8 if before is None else 16, **early(out.values),
    )  # fmt: skip


def _strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def _written(out: ScaledTensor, x: Tensor) -> dict[str, Any]:
    """Arguments that say how a row of `out` is written, made from values of the type of `x`."""
    width = out.values.shape[2]
    block = triton.next_power_of_2(width)
    if out.values.dtype != torch.int8:
        return {"table": None, "BLOCK": block, "PARTS": 0, "UNIT": 0.0}
    wide = rotation.block(width)
    return {
        "table": rotation.table(x.device, x.dtype), "BLOCK": max(block, FEWEST * wide),
        "PARTS": wide // rotation.HALF, "UNIT": rotation.unit(width),
    }  # fmt: skip
