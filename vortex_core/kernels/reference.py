"""The kernels in plain torch: what each one means, the oracle of the fused ones, and the path where those cannot run.

Legend: B pictures, T tokens of one stream, D hidden, H heads, C channels of a head. Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nf4
from .operand import FP8_MAX, SMALLEST, Operand

EPSILON = 1e-6  # of every norm in FLUX


def decode(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None = None) -> None:
    """NF4 (uint8 `[N, K/2]`, fp32 `[N, K/64]`) to `out` `[N, K]`, divided by `row_scale` (fp32 `[N]`) if given."""
    if row_scale is not None:
        absmax = absmax / row_scale[:, None]
    out.copy_(nf4.dequantize(nf4.NF4Weight(packed, absmax), torch.float32))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: Operand) -> None:
    """adaLN: layer norm without weights, then `(1 + scale) * x + shift`. `x` `[B, T, D]`, `shift`, `scale` `[D]`."""
    normal = F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)
    _write(normal * (1 + scale.float()) + shift.float(), out)


def residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: Operand) -> None:
    """`x += gate * y` in place, then `modulate`: the end of one branch and the start of the next."""
    x.copy_(x.float() + gate.float() * y.float())
    modulate(x, shift, scale, out)


def gelu(x: Tensor, out: Operand, before: Tensor | None = None) -> None:
    """GELU (tanh form) of `x` `[B, T, W]`; `before` `[B, T, A]` goes in front of it, as it is. `out` may be `x`."""
    y = F.gelu(x.float(), approximate="tanh")
    _write(y if before is None else torch.cat((before.float(), y), dim=-1), out)


def quantize(x: Tensor, out: Operand) -> None:
    """`x` `[B, T, K]` to fp8 with a scale for each token."""
    _write(x.float(), out)


def rotate(qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """RMS norm over a head and rotary embedding, in place on q and k of `qkv` `[B, T, 3, H, C]`.

    FLUX pairs channels (2c, 2c+1). `query_norm`, `key_norm` `[C]`; `cos`, `sin` fp32 `[T, C/2]`.
    """
    weight = torch.stack((query_norm, key_norm)).float()[:, None]  # [2, 1, C]
    x = F.rms_norm(qkv[:, :, :2].float(), qkv.shape[-1:], eps=EPSILON) * weight
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    qkv[:, :, :2] = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def group_sums(x: Tensor, groups: int) -> Tensor:
    """fp32 `[groups, 2]`: sum and sum of squares of each group of `x` `[1, C, h, w]`. Those of strips add up."""
    values = x.float().reshape(groups, -1)
    return torch.stack((values.sum(1), values.square().sum(1)), dim=1)


def norm_silu(x: Tensor, sums: Tensor, pixels: int, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Group norm and SiLU of `x` `[1, C, h, w]` by the `sums` over `pixels` positions, into `out`, perhaps `x`."""
    groups, channels = sums.shape[0], x.shape[1]
    mean, square = (sums / (pixels * (channels // groups))).repeat_interleave(channels // groups, 0).unbind(1)
    scale = (square - mean * mean + EPSILON).rsqrt() * weight.float()
    y = x.float() * scale[:, None, None] + (bias.float() - mean * scale)[:, None, None]
    return out.copy_(F.silu(y))


def row_scales(absmax: Tensor) -> Tensor:
    """fp32 `[N]`: what `decode` divides by so that each row fills fp8's range. The largest level of NF4 is 1."""
    return absmax.amax(dim=1).clamp_min(SMALLEST) / FP8_MAX


def _write(y: Tensor, out: Operand) -> None:
    if out.scale is not None:
        scale = y.abs().amax(dim=-1).clamp_min(SMALLEST) / FP8_MAX
        out.scale.copy_(scale)
        y = y * (1 / scale)[..., None]
    out.values.copy_(y)
