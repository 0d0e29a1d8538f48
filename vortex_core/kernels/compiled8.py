"""The kernels in CUDA C of the precisions in 8 bits: decode, rows, and the product of int8. compiled.py offers them.

They allocate nothing. What is decoded to fp8 is equal to the reference's, bit for bit. To int8: `weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rotation
from .card import card
from .nvrtc import Long, launch
from .scaled_tensor import ScaledTensor

THREADS = 256
CHUNKS = 4  # of 8 values of a row, that a thread takes at most; in rows8.cu, too
WIDEST = 8 * CHUNKS * 1024
TURNS = 3  # as CHUNKS, of adaLN; in values.cuh, too
WIDEST_ADALN = 8 * TURNS * 512
TILE, PRODUCT_THREADS = 128, 128


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor) -> None:
    """See `reference.dequantize`, to fp8. All contiguous."""
    n, k = out.shape
    words = n * k // 8
    launch(
        "decode_fp8", (-(-words // (4 * THREADS)), 1), THREADS, out.device, torch.bfloat16,
        packed, absmax, row_scale, out, Long(words), k // 8, module="eight",
    )  # fmt: skip


def modulate(x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.modulate`, and `residual_modulate` with `y` and `gate`. At most `WIDEST_ADALN` values a row."""
    batch, tokens, width = x.shape
    launch(
        "modulate8", (batch * tokens, 1), adaln_threads(width), x.device, x.dtype,
        *strided(x), *strided(y), gate, shift, scale, *strided(out.values), *strided(out.scale), tokens,
        width, *_kind(out, width), module="eight",
    )  # fmt: skip


def narrow(x: Tensor, out: ScaledTensor, before: Tensor | None, *, gelu: bool) -> None:
    """See `reference.gelu` and, without `gelu`, `reference.quantize`. At most `WIDEST` values a row."""
    batch, tokens, width = out.values.shape
    first = width - x.shape[2]
    launch(
        "narrow8", (batch * tokens, 1), 32 * -(-width // (256 * CHUNKS)), x.device, x.dtype,
        *strided(before), *strided(x), *strided(out.values), *strided(out.scale), tokens,
        first, width, int(gelu), *_kind(out, width), module="eight",
    )  # fmt: skip


def multiply_int8(
    x: Tensor, x_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """See `reference.multiply_int8`. Rows of `x` and `weight` start at multiples of 16 bytes, and K is one of 64.

    Tiles are half as wide where whole ones would leave multiprocessors idle.
    """
    (m, k), n = x.shape, len(weight)
    assert k % rotation.HALF == 0
    down, across = -(-m // TILE), -(-n // TILE)
    wide = TILE if down * across >= card(out.device).processors else TILE // 2
    launch(
        f"product_{wide}", (down * -(-n // wide), 1), PRODUCT_THREADS, out.device, out.dtype,
        x, Long(x.stride(0)), x_scale, weight, Long(weight.stride(0)), row_scale, bias, out, Long(out.stride(0)),
        m, n, k, module="eight",
    )  # fmt: skip


def adaln_threads(width: int) -> int:
    """Threads of a block that takes a row of so many values."""
    return 32 * -(-width // (32 * 8 * TURNS))


def strided(x: Tensor | None) -> tuple[Tensor | None, Long, Long]:
    """A tensor with the strides of its pictures and tokens."""
    return (None, Long(0), Long(0)) if x is None else (x, Long(x.stride(0)), Long(x.stride(1)))


def _kind(out: ScaledTensor, width: int) -> tuple[int, float]:
    """How rows are written: rows8.cu's `kind` and `unit`."""
    return 1 + _joined(width) if out.values.dtype == torch.int8 else 0, rotation.unit(width)


def _joined(k: int) -> int:
    return int(rotation.block(k) != rotation.HALF)
