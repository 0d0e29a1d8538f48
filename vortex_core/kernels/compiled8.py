"""The kernels in CUDA C of the precisions in 8 bits: decode, rows, and the product of int8. compiled.py offers them.

They allocate nothing. What is decoded, and the row scales for int8, are equal to the reference's, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rotation
from .card import card
from .nvrtc import Long, launch
from .scaled_tensor import ScaledTensor

THREADS = 256
BLOCKS = 2  # of a kernel that a multiprocessor runs at once: what registers and shared memory are made for
CHUNKS = 4  # of 8 values of a row, that a thread takes at most; in rows8.cu, too
WIDEST = 8 * CHUNKS * 1024
TURNS = 3  # as CHUNKS, of adaLN; in values.cuh, too
WIDEST_ADALN = 8 * TURNS * 512
TILE, PRODUCT_THREADS = 128, 128


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor) -> None:
    """See `reference.dequantize`, to int8 or fp8. All contiguous."""
    n, k = out.shape
    if out.dtype != torch.int8:
        words = n * k // 8
        launch(
            "decode_fp8", (-(-words // (4 * THREADS)), 1), THREADS, out.device, torch.bfloat16,
            packed, absmax, row_scale, out, Long(words), k // 8, module="eight",
        )  # fmt: skip
        return
    halves = n * k // rotation.HALF
    blocks = min(-(-halves // THREADS), BLOCKS * card(out.device).processors)
    launch(
        "decode_rotated", (blocks, 1), THREADS, out.device, torch.bfloat16,
        _aligned(packed), absmax, row_scale, out, halves, k // rotation.HALF, _joined(k), rotation.block(k) ** 0.5,
        module="eight",
    )  # fmt: skip


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor) -> None:
    """See `reference.row_scales`, for int8. All contiguous."""
    n, k = len(packed), packed.shape[1] * 2
    blocks = min(-(-n // (THREADS // 32)), BLOCKS * card(out.device).processors)
    launch(
        "rotated_scales", (blocks, 1), THREADS, out.device, torch.bfloat16,
        _aligned(packed), absmax, out, n, k // rotation.HALF, _joined(k), rotation.unit(k), module="eight",
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


def _aligned(x: Tensor) -> Tensor:
    """`x`, for loads of 16 bytes. Weights at work lie so; those that are read may not."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _kind(out: ScaledTensor, width: int) -> tuple[int, float]:
    """How rows are written: rows8.cu's `kind` and `unit`."""
    return 1 + _joined(width) if out.values.dtype == torch.int8 else 0, rotation.unit(width)


def _joined(k: int) -> int:
    return int(rotation.block(k) != rotation.HALF)
