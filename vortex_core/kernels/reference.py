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
    """GELU (tanh form) of `x` `[B, T, W]` to fp8 with a scale for each token, `before` `[B, T, A]` in front of it."""
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


def group_moments(x: Tensor, groups: int) -> Tensor:
    """fp32 `[parts, groups, 3]` of `x` `[1, C, h, w]`: count, mean and sum of squares about it, of each group and part.

    However many parts there are, and of however many strips: `join_moments` makes one of them.
    """
    values = x.float().reshape(groups, -1)
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    count = torch.full_like(mean, values.shape[1])
    return torch.stack((count, mean, variance * count), dim=1)[None]


def join_moments(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance `[groups]` of all that `group_moments` saw (Chan et al., 1979)."""
    count, mean, square = parts.unbind(2)
    total = count.sum(0)
    joint = (count * mean).sum(0) / total
    return joint, (square + count * (mean - joint).square()).sum(0) / total


def norm_silu(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """`silu(x * scale + shift)` of `x` `[1, C, h, w]` into `out`, which may be `x`; `scale`, `shift` fp32 `[C]`."""
    torch.addcmul(shift[:, None, None], x, scale[:, None, None], out=out)  # no map in fp32, for one more rounding
    return F.silu(out, inplace=True)


def row_scales(absmax: Tensor) -> Tensor:
    """fp32 `[N]`: what `decode` divides by so that each row fills fp8's range. The largest level of NF4 is 1."""
    return absmax.amax(dim=1).clamp_min(SMALLEST) / FP8_MAX


def _write(y: Tensor, out: Operand) -> None:
    if out.scale is not None:
        scale = y.abs().amax(dim=-1).clamp_min(SMALLEST) / FP8_MAX
        out.scale.copy_(scale)
        y = y * (1 / scale)[..., None]
    out.values.copy_(y)
