"""Row kernels: one program for each token, which reads and writes device memory once.

A row stays in registers: the fp8 scale needs the token's largest value, which so costs no second pass. For int8, rows
are rotated too: `rotated_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rotated_rows
from .launch import early, follow
from .reference import LEAST_NORM
from .row_parts import activated, modulated, row_of, strided
from .scaled_tensor import FP8_MAX, SMALLEST, ScaledTensor

_FP8_MAX = tl.constexpr(FP8_MAX)
_SMALLEST = tl.constexpr(SMALLEST)
_LEAST_NORM = tl.constexpr(LEAST_NORM)


@triton.jit
def _write(y, out, out_b, out_t, scale, scale_b, scale_t, T, column, mask, QUANTIZE: tl.constexpr):
    if QUANTIZE:
        unit = tl.maximum(tl.max(tl.abs(y), 0), _SMALLEST) / _FP8_MAX
        tl.store(row_of(scale, scale_b, scale_t, T), unit)
        y *= 1 / unit
    tl.store(row_of(out, out_b, out_t, T) + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_b", "T"])
def _modulate(
    x, x_b, x_t, y, y_b, y_t, gate, shift, scale, out, out_b, out_t, out_scale, scale_b, scale_t, T,
    D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    column = tl.arange(0, BLOCK)
    mask = column < D
    x, y = row_of(x, x_b, x_t, T), row_of(y, y_b, y_t, T) if RESIDUAL else x
    value = modulated(x, y, gate, shift, scale, column, mask, D, RESIDUAL)
    _write(value, out, out_b, out_t, out_scale, scale_b, scale_t, T, column, mask, QUANTIZE)


@triton.jit(do_not_specialize=["scale_b", "T"])
def _gelu(
    before, before_b, before_t, x, x_b, x_t, out, out_b, out_t, out_scale, scale_b, scale_t, T,
    A: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    column = tl.arange(0, BLOCK)
    value = tl.load(row_of(x, x_b, x_t, T) + column - A, mask=(column >= A) & (column < A + W), other=0.0)
    value = value.to(tl.float32)
    if GELU:
        value = activated(value)
    if A > 0:
        first = tl.load(row_of(before, before_b, before_t, T) + column, mask=column < A, other=0.0)
        value = tl.where(column < A, first.to(tl.float32), value)
    _write(value, out, out_b, out_t, out_scale, scale_b, scale_t, T, column, column < A + W, True)


@triton.jit(do_not_specialize=["T"])
def _guide(
    wanted, wanted_b, wanted_t, avoided, avoided_b, avoided_t, terms, out, out_b, out_t, T,
    D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    follow(EARLY)
    column = tl.arange(0, BLOCK)
    mask = column < D
    plain = tl.load(row_of(wanted, wanted_b, wanted_t, T) + column, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row_of(avoided, avoided_b, avoided_t, T) + column, mask=mask, other=0.0).to(tl.float32)
    scale, tau, alpha = tl.load(terms), tl.load(terms + 1), tl.load(terms + 2)
    led = plain * scale - other * (scale - 1)
    before = tl.maximum(tl.sum(tl.abs(plain), 0), _LEAST_NORM)
    ratio = tl.maximum(tl.sum(tl.abs(led), 0), _LEAST_NORM) / before
    led = plain * (1 - alpha) + led * (alpha * tl.minimum(ratio, tau) / ratio)
    tl.store(row_of(out, out_b, out_t, T) + column, led.to(out.dtype.element_ty), mask=mask)


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


def guide(wanted: Tensor, avoided: Tensor, terms: Tensor, out: Tensor) -> None:
    """See `reference.guide`."""
    batch, tokens, width = wanted.shape
    _guide[(batch * tokens,)](
        *strided(wanted), *strided(avoided), terms, *strided(out), tokens,
        D=width, BLOCK=triton.next_power_of_2(width), num_warps=4, **early(out),
    )  # fmt: skip


def _launch_modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, out: ScaledTensor
) -> None:
    if out.values.dtype == torch.int8:
        rotated_rows.modulate(x, y, gate, shift, scale, out)
        return
    batch, tokens, width = x.shape
    _modulate[(batch * tokens,)](
        *strided(x), *strided(y), gate, shift, scale, *strided(out.values), *strided(out.scale), tokens,
        D=width, BLOCK=triton.next_power_of_2(width), RESIDUAL=y is not None, QUANTIZE=out.scale is not None,
        num_warps=4, **early(out.values),
    )  # fmt: skip


def _launch_gelu(x: Tensor, out: ScaledTensor, before: Tensor | None, *, gelu: bool) -> None:
    if out.values.dtype == torch.int8:
        rotated_rows.gelu(x, out, before, gelu=gelu)
        return
    batch, tokens, width = x.shape
    first = 0 if before is None else before.shape[2]
    block = triton.next_power_of_2(first + width)
    _gelu[(batch * tokens,)](
        *strided(before), *strided(x), *strided(out.values), *strided(out.scale), tokens,
        A=first, W=width, BLOCK=block, GELU=gelu,
        num_warps=4 if block <= 4096 else 8 if before is None else 16, **early(out.values),
    )  # fmt: skip
