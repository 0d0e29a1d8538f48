"""Row kernels that write int8: a token's row is rounded to the type it came in, rotated, and rounded with its scale.

One program for each token, as in `rows`. A wide row is made in chunks that fit a product, since a power of two that
holds all of it would be a quarter empty; the rotated chunks stay in registers until the largest value is known.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import rotation
from .launch import early, follow
from .rotated import FEWEST, halves, in_order, load_table, rounded, rows_of
from .row_parts import activated, activated_fast, modulated, row_of, strided
from .scaled_tensor import SMALLEST, ScaledTensor

_INT8_MAX = tl.constexpr(rotation.INT8_MAX)
_HALF = tl.constexpr(rotation.HALF)
_SMALLEST = tl.constexpr(SMALLEST)
MOST = 4  # chunks of a row
FEW, MANY = 4, 8  # warps of a program: many where a row is wide, and no more of it is empty than with few


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rotated(values, table, PARTS: tl.constexpr):
    return halves(tl.dot(rows_of(values, PARTS), table, input_precision="ieee"), PARTS)


@triton.jit
def _larger_of(first, second):
    return _larger(tl.abs(first), tl.abs(second))


@triton.jit
def _store(first, second, factor, out, start: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr):
    """Write rotated blocks, from value `start` of the row on, of which W are written."""
    block = start // (PARTS * _HALF) + tl.arange(0, first.shape[0])[:, None]
    place, mask = out + block * (PARTS * _HALF) + tl.arange(0, _HALF)[None, :], block < W // (PARTS * _HALF)
    tl.store(place, in_order(rounded(first * factor)), mask=mask)
    if PARTS == 2:
        tl.store(place + _HALF, in_order(rounded(second * factor)), mask=mask)


@triton.jit
def _scale(largest, scale, UNIT: tl.constexpr):
    """Write the scale of a row, and return what its values are multiplied by. NaN shows there: it cannot in int8."""
    largest = _larger(tl.reduce(tl.reduce(largest, 1, _larger), 0, _larger), _SMALLEST)
    tl.store(scale, largest * UNIT)
    return _INT8_MAX / largest


@triton.jit(do_not_specialize=["scale_b", "T"])
def _modulate(
    x, x_b, x_t, y, y_b, y_t, gate, shift, scale, out, out_b, out_t, out_scale, scale_b, scale_t, T, table,
    D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr, UNIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    table = load_table(table)
    follow(EARLY)
    column = tl.arange(0, BLOCK)
    x, y = row_of(x, x_b, x_t, T), row_of(y, y_b, y_t, T) if RESIDUAL else x
    value = modulated(x, y, gate, shift, scale, column, column < D, D, RESIDUAL)
    first, second = _rotated(value.to(x.dtype.element_ty), table, PARTS)
    factor = _scale(_larger_of(first, second), row_of(out_scale, scale_b, scale_t, T), UNIT)
    _store(first, second, factor, row_of(out, out_b, out_t, T), 0, D, PARTS)


@triton.jit
def _read(before, x, start: tl.constexpr, A: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr):
    """Values `start` and on of the row that has `before` in front of `x`."""
    column = start + tl.arange(0, CHUNK)
    if start + CHUNK <= A:
        value = tl.load(before + column)
    else:
        value = tl.load(x + column - A, mask=(column >= A) & (column < A + W), other=0.0)
        if start < A:
            value = tl.where(column < A, tl.load(before + column, mask=column < A, other=0.0), value)
    return value


@triton.jit
def _finish(
    value, table, start: tl.constexpr, A: tl.constexpr, GELU: tl.constexpr, FAST: tl.constexpr, PARTS: tl.constexpr
):
    """What `_read` has read, after GELU where that is due, rotated."""
    if GELU and start + value.numel > A:
        active = value.to(tl.float32)
        active = (activated_fast(active) if FAST else activated(active)).to(value.dtype)
        if start < A:
            active = tl.where(start + tl.arange(0, value.numel) < A, value, active)
        value = active
    return _rotated(value, table, PARTS)


@triton.jit(do_not_specialize=["scale_b", "T"])
def _gelu(
    before, before_b, before_t, x, x_b, x_t, out, out_b, out_t, out_scale, scale_b, scale_t, T, table,
    A: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GELU: tl.constexpr,
    FAST: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    table = load_table(table)
    follow(EARLY)
    x, out = row_of(x, x_b, x_t, T), row_of(out, out_b, out_t, T)
    if A > 0:
        before = row_of(before, before_b, before_t, T)
    # a chunk is read before the one in front of it is computed
    value = _read(before, x, 0, A, W, CHUNK)
    if CHUNKS > 1:
        ahead = _read(before, x, CHUNK, A, W, CHUNK)
    a, b = _finish(value, table, 0, A, GELU, FAST, PARTS)
    largest = _larger_of(a, b)
    if CHUNKS > 1:
        value = ahead
        if CHUNKS > 2:
            ahead = _read(before, x, 2 * CHUNK, A, W, CHUNK)
        c, d = _finish(value, table, CHUNK, A, GELU, FAST, PARTS)
        largest = _larger(largest, _larger_of(c, d))
    if CHUNKS > 2:
        value = ahead
        if CHUNKS > 3:
            ahead = _read(before, x, 3 * CHUNK, A, W, CHUNK)
        e, f = _finish(value, table, 2 * CHUNK, A, GELU, FAST, PARTS)
        largest = _larger(largest, _larger_of(e, f))
    if CHUNKS > 3:
        g, h = _finish(ahead, table, 3 * CHUNK, A, GELU, FAST, PARTS)
        largest = _larger(largest, _larger_of(g, h))
    factor = _scale(largest, row_of(out_scale, scale_b, scale_t, T), UNIT)
    _store(a, b, factor, out, 0, A + W, PARTS)
    if CHUNKS > 1:
        _store(c, d, factor, out, CHUNK, A + W, PARTS)
    if CHUNKS > 2:
        _store(e, f, factor, out, 2 * CHUNK, A + W, PARTS)
    if CHUNKS > 3:
        _store(g, h, factor, out, 3 * CHUNK, A + W, PARTS)


def modulate(x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """`reference.modulate`, or `residual_modulate` where `y` is given."""
    batch, tokens, width = x.shape
    _modulate[(batch * tokens,)](
        *strided(x), *strided(y), gate, shift, scale, *strided(out.values), *strided(out.scale), tokens,
        **_rotation(x, width), D=width, BLOCK=max(FEWEST, triton.next_power_of_2(width)), RESIDUAL=y is not None,
        num_warps=warps_of(width), **early(out.values),
    )  # fmt: skip


def gelu(x: Tensor, out: ScaledTensor, before: Tensor | None, *, gelu: bool) -> None:
    """`reference.gelu`, or `quantize` without `gelu`."""
    batch, tokens, width = x.shape
    first = 0 if before is None else before.shape[2]
    most = triton.next_power_of_2(first + width)
    warps = warps_of(first + width)
    chunk = max(FEWEST, min(most, FEWEST * warps), most // MOST)
    _gelu[(batch * tokens,)](
        *strided(before), *strided(x), *strided(out.values), *strided(out.scale), tokens,
        **_rotation(x, first + width), A=first, W=width, CHUNK=chunk, CHUNKS=triton.cdiv(first + width, chunk),
        GELU=gelu, FAST=isinstance(_gelu, JITFunction), num_warps=warps, **early(out.values),
    )  # fmt: skip


def warps_of(width: int) -> int:
    """Warps of a program that rotates a row of `width` values."""
    few, many = (warps * -(-width // (warps * FEWEST)) for warps in (FEW, MANY))
    return MANY if width > FEW * FEWEST and many <= few else FEW


def _rotation(x: Tensor, width: int) -> dict[str, Any]:
    """Arguments that say how rows of `width` values are rotated, which are made from values of the type of `x`."""
    return {
        "table": rotation.shuffled_table(x.device, x.dtype),
        "PARTS": rotation.block(width) // rotation.HALF,
        "UNIT": rotation.unit(width),
    }
