"""The kernels of a step in torch's own functions, as few of them as possible: where nothing else runs on a card.

`reference` says what each one computes. Here `1 + scale` is rounded, too, so a value may be off by two roundings of its
type. All else is the reference's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import (
    EPSILON,
    attend,
    attend_heads,
    attention_bytes,
    bordered,
    convolve,
    convolve_doubled,
    corner_taps,
    dequantize,
    gelu,
    group_moments,
    guide,
    multiply_int8,
    norm_silu,
    norm_terms,
    pack_heads,
    quantize,
    row_scales,
    strip_bytes,
)
from .scaled_tensor import ScaledTensor

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

TOKENS = 4096  # of all pictures together, that are taken at once


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.modulate`."""
    if out.scale is not None:
        reference.modulate(x, shift, scale, out)
        return
    factor, step = scale + 1, max(1, TOKENS // len(x))
    for part, place in zip(x.split(step, 1), out.values.split(step, 1), strict=True):
        place.copy_(F.layer_norm(part, x.shape[-1:], factor, shift, EPSILON))


def residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.residual_modulate`."""
    torch.addcmul(x, y, gate, out=x)
    modulate(x, shift, scale, out)


def rotate(qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `reference.rotate`: a pair of channels is turned as a complex number."""
    turn, step = torch.complex(cos, sin)[:, None], max(1, TOKENS // (3 * len(qkv)))
    for i, norm in enumerate((query_norm.float(), key_norm.float())):
        for part, angle in zip(qkv[:, :, i].split(step, 1), turn.split(step), strict=True):
            normal = F.rms_norm(part.float(), norm.shape, norm, EPSILON)
            torch.view_as_complex(normal.unflatten(-1, (-1, 2))).mul_(angle)
            part.copy_(normal)


def step_bytes(hidden: int) -> int:
    """See `reference.step_bytes`."""
    # rows in fp32 with their moments; a third of them twice in fp32, and the turns, at most as large as a row of heads
    return TOKENS * (4 * hidden + 16) + 4 * 4 * hidden
