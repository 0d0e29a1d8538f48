"""The kernels in CUDA C (the folder `cuda`), for cards without Triton. `reference` says what each one computes.

Those of a step allocate nothing. The decoder's surround the library's convolutions: `strip_bytes` says what those take.
Those in 8 bits are in `compiled8`; what decodes to int8 and adds LoRAs is in `weights`. Attention in fp8 is the
reference's here, and nobody asks for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled8, reference, weights
from .adapter import Adapter
from .compiled8 import WIDEST_ADALN, adaln_threads, strided
from .nvrtc import Long, launch
from .on_device import on_device
from .reference import attend, attend_heads, attention_bytes, pack_heads
from .scaled_tensor import FP8, VALUES, Moments, ScaledTensor, Window, chunk_rows

__all__ = [
    "attend",
    "attend_heads",
    "attention_bytes",
    "bordered",
    "convolve",
    "convolve_doubled",
    "corner_taps",
    "dequantize",
    "gelu",
    "group_moments",
    "guide",
    "modulate",
    "multiply_int8",
    "norm_silu",
    "norm_terms",
    "pack_heads",
    "quantize",
    "residual_modulate",
    "rotate",
    "row_scales",
    "step_bytes",
    "strip_bytes",
]

EIGHT = (torch.int8, FP8)
THREADS = 256
LONGEST = 128  # channels of a head


@on_device
def dequantize(
    packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None = None, adapter: Adapter | None = None
) -> None:
    """See `reference.dequantize`."""
    if out.dtype == torch.int8 or weights.adds(adapter):
        weights.dequantize(packed, absmax, out, row_scale, adapter)
        return
    if row_scale is not None:
        way = compiled8.dequantize if out.dtype == FP8 else reference.dequantize
        way(packed, absmax, out, row_scale)
        return
    words = packed.numel() // 4
    grid = (-(-words // (4 * THREADS)), 1)
    launch("decode", grid, THREADS, out.device, out.dtype, packed, absmax, out, Long(words))
    if adapter is not None:
        adapter.add_to(out)


@on_device
def row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None) -> None:
    """See `reference.row_scales`, which is used for fp8 without an adapter."""
    if adapter is not None or dtype == torch.int8:
        weights.row_scales(packed, absmax, out, dtype, adapter)
    else:
        reference.row_scales(packed, absmax, out, dtype)


multiply_int8 = on_device(compiled8.multiply_int8)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.modulate`."""
    if _no_kernel(out) or x.shape[2] > WIDEST_ADALN:
        reference.modulate(x, shift, scale, out)
    else:
        _modulate(x, None, None, shift, scale, out)


def residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.residual_modulate`."""
    if _no_kernel(out) or x.shape[2] > WIDEST_ADALN:
        reference.residual_modulate(x, y, gate, shift, scale, out)
    else:
        _modulate(x, y, gate, shift, scale, out)


@on_device
def gelu(x: Tensor, out: ScaledTensor, before: Tensor | None = None) -> None:
    """See `reference.gelu`."""
    odd = before is not None and before.shape[2] % 8
    if odd or _no_kernel(out) or out.values.shape[2] > compiled8.WIDEST:
        reference.gelu(x, out, before)
    else:
        compiled8.narrow(x, out, before, gelu=True)


@on_device
def quantize(x: Tensor, out: ScaledTensor) -> None:
    """See `reference.quantize`."""
    if _no_kernel(out) or out.values.shape[2] > compiled8.WIDEST:
        reference.quantize(x, out)
    else:
        compiled8.narrow(x, out, None, gelu=False)


def _no_kernel(out: ScaledTensor) -> bool:
    return out.scale is not None and (out.values.dtype not in EIGHT or out.values.shape[2] % 8 != 0)


@on_device
def _modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, out: ScaledTensor
) -> None:
    if out.scale is not None:
        compiled8.modulate(x, y, gate, shift, scale, out)
        return
    batch, tokens, width = x.shape
    launch(
        "modulate", (batch * tokens, 1), adaln_threads(width), x.device, x.dtype,
        *strided(x), *strided(y), gate, shift, scale, *strided(out.values), tokens, width,
    )  # fmt: skip


@on_device
def rotate(qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `reference.rotate`. `qkv[b, t]` and the tables are contiguous."""
    batch, tokens, _, heads, channels = qkv.shape
    if channels > LONGEST or channels % 4:
        reference.rotate(qkv, query_norm, key_norm, cos, sin)
        return
    launch(
        "rotate", (batch * tokens, 2), THREADS, qkv.device, qkv.dtype,
        *strided(qkv), query_norm, key_norm, cos, sin, tokens, heads, channels,
    )  # fmt: skip


@on_device
def guide(wanted: Tensor, avoided: Tensor, terms: Tensor, out: Tensor) -> None:
    """See `reference.guide`."""
    batch, tokens, width = wanted.shape
    if width > WIDEST_ADALN:
        reference.guide(wanted, avoided, terms, out)
        return
    launch(
        "guide", (batch * tokens, 1), adaln_threads(width), wanted.device, wanted.dtype,
        *strided(wanted), *strided(avoided), terms, *strided(out), tokens, width,
    )  # fmt: skip


def step_bytes(hidden: int) -> int:
    """See `reference.step_bytes`: nothing."""
    return 0


@on_device
def group_moments(x: Tensor, moments: Moments) -> None:
    """See `reference.group_moments`. Channels are a power of two, from 8 to 2048; at most 256 groups."""
    channels, values = x.shape[1], x.numel()
    _, groups, capacity = moments.values.shape
    parts = -(-values // VALUES)
    launch(
        "moments", (parts, 1), THREADS, x.device, x.dtype,
        x, Long(values), channels, groups, moments.values, moments.take(parts), capacity,
    )  # fmt: skip


@on_device
def norm_terms(moments: Moments, weight: Tensor, bias: Tensor, epsilon: float, out: Tensor) -> None:
    """See `reference.norm_terms`."""
    _, groups, capacity = moments.values.shape
    launch(
        "terms", (groups, 1), THREADS, out.device, weight.dtype,
        moments.values, moments.parts, capacity, groups, weight, bias, float(epsilon), out, len(weight),
    )  # fmt: skip


def norm_silu(window: Window, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """See `reference.norm_silu`."""
    _bordered(out, window, scale, shift)


def bordered(window: Window, out: Tensor) -> None:
    """See `reference.bordered`."""
    _bordered(out, window, None, None)


@on_device
def _bordered(out: Tensor, window: Window, scale: Tensor | None, shift: Tensor | None) -> None:
    _, channels, height, width = window.strip.shape
    grid = (-(-out.numel() // (8 * THREADS)), 1)
    launch("bordered", grid, THREADS, out.device, out.dtype, *window, scale, shift, out, height, width, channels)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None, *, add: bool = False
) -> None:
    """See `reference.convolve`. The library convolves, into memory that it allocates."""
    step = chunk_rows(out.shape[1] * out.shape[3])
    for top in range(0, out.shape[2], step):
        found = F.conv2d(x[:, :, top : top + step + 2], weight)
        _finish(found, bias, out[:, :, top : top + step], add=add)
        del found  # before the next chunk is made
    if moments is not None:
        group_moments(out, moments)


@on_device
def corner_taps(weight: Tensor, out: Tensor) -> None:
    """`weight` `[N, C, 3, 3]` as `convolve_doubled` takes it, to `out` `[4 N, 4 C]`: 2 x 2 taps for each corner."""
    wide, channels = weight.shape[:2]
    grid = (-(-out.numel() // THREADS), 1)
    strides = map(Long, weight.stride())
    launch("corners", grid, THREADS, out.device, out.dtype, weight, *strides, out, wide, channels)


def convolve_doubled(x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None) -> None:
    """See `reference.convolve_doubled`. One convolution has the four corners of a pixel in four times the channels."""
    wide = out.shape[1]
    weight = taps.view(4 * wide, 2, 2, -1).permute(0, 3, 1, 2)
    height, width = out.shape[2] // 2, out.shape[3] // 2
    step = chunk_rows(4 * wide * (width + 1))
    for top in range(0, height, step):
        rows = min(step, height - top)
        found = F.conv2d(x[:, :, top : top + rows + 2], weight)  # [1, 4 N, rows + 1, width + 1]
        place = out[:, :, 2 * top : 2 * (top + rows)]
        for corner in range(4):
            lower, right = corner // 2, corner % 2
            own, down, across = slice(corner * wide, (corner + 1) * wide), lower + rows, right + width
            part = found[:, own, lower:down, right:across]
            _finish(part, bias, place[:, :, lower::2, right::2], add=False)
        del found, part  # before the next chunk is made
    if moments is not None:
        group_moments(out, moments)


@on_device
def _finish(found: Tensor, bias: Tensor, out: Tensor, *, add: bool) -> None:
    _, channels, height, width = out.shape
    assert found.stride(1) == out.stride(1) == 1
    grid = (-(-(height * width * -(-channels // 8)) // THREADS), 1)
    launch(
        "finish", grid, THREADS, out.device, out.dtype,
        found, Long(found.stride(2)), Long(found.stride(3)), bias, out, Long(out.stride(2)), Long(out.stride(3)),
        height, width, channels, int(add),
    )  # fmt: skip


def strip_bytes(inside: int, outside: int, width: int, itemsize: int, *, doubled: bool = False) -> int:
    """See `reference.strip_bytes`: what `convolve` or `convolve_doubled` gets from the library."""
    if doubled:
        row = 4 * outside * (width + 1)
        return itemsize * (chunk_rows(row) + 1) * row
    return itemsize * chunk_rows(width * outside) * width * outside
