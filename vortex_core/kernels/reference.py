"""The kernels in plain torch: what each one means, the oracle of the fused ones, and the path where those cannot run.

Legend: B pictures, T tokens of one stream, D hidden, H heads, C channels of a head. Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nf4
from .operand import FP8_MAX, SMALLEST, TILE, Heads, Operand, Window

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


def pack_heads(qkv: Tensor, norms: Sequence[Tensor], boundary: int, cos: Tensor, sin: Tensor, heads: Heads) -> None:
    """`rotate` of `qkv` `[B, L, 3, H, C]`, and all of it to fp8.

    `norms` are those of queries and keys of the tokens before `boundary`, and those of the others. Queries and keys are
    scaled by what none of them can exceed, so that nobody need look for the largest; values by the largest of a tile.
    """
    whole = qkv.to(torch.float32, copy=True)
    rotate(whole[:, :boundary], norms[0], norms[1], cos[:boundary], sin[:boundary])
    rotate(whole[:, boundary:], norms[2], norms[3], cos[boundary:], sin[boundary:])
    q, k, v = whole.unbind(2)
    largest = torch.stack([norm.float().abs().amax() for norm in norms]).view(2, 2).amax(0)
    heads.unit.copy_((largest * q.shape[-1] ** 0.5).clamp_min(SMALLEST) / FP8_MAX)
    heads.q.copy_(q / heads.unit[0])
    heads.k.copy_(k / heads.unit[1])
    v = F.pad(v.permute(0, 2, 3, 1), (0, heads.v.shape[-1] - v.shape[1])).unflatten(-1, (-1, TILE))
    heads.v_scale.copy_(v.abs().amax(dim=(2, 4)).clamp_min(SMALLEST) / FP8_MAX)
    v = (v / heads.v_scale[:, :, None, :, None]).flatten(-2)
    heads.v.copy_(v.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4))


def attend_heads(heads: Heads, out: Tensor) -> None:
    """Attention of what `pack_heads` packed, to `out` `[B, L, H, C]`.

    Here weights stay in fp32. `fused` rounds them to fp8, and sums tiles in fp32.
    """
    v = heads.v.float().unflatten(-1, (-1, TILE)) * heads.v_scale[:, :, None, :, None]
    v = v.flatten(-2).unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)[..., : out.shape[1]].mT
    q, k = ((x.float() * unit).transpose(1, 2) for x, unit in zip((heads.q, heads.k), heads.unit, strict=True))
    out.copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def group_moments(x: Tensor, groups: int) -> Tensor:
    """fp32 `[3, groups, parts]` of `x` `[1, C, h, w]`: count, mean and sum of squares about it, of each group and part.

    However many parts there are, and of however many strips: `norm_terms` joins them.
    """
    values = x.float().reshape(groups, -1)
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    count = torch.full_like(mean, values.shape[1])
    return torch.stack((count, mean, variance * count))[..., None]


def norm_terms(moments: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Scale and shift, fp32 `[C]`, of the group norm whose map has `moments` (joined as in Chan et al., 1979)."""
    count, mean, square = moments
    total = count.sum(1)
    joint = (count * mean).sum(1) / total
    variance = (square + count * (mean - joint[:, None]).square()).sum(1) / total
    channels = len(weight) // len(total)
    scale = weight.float() * (variance + epsilon).rsqrt().repeat_interleave(channels)
    return scale, bias.float() - joint.repeat_interleave(channels) * scale


def norm_silu(window: Window, scale: Tensor, shift: Tensor) -> Tensor:
    """`silu(x * scale + shift)` of the window's rows, bordered; `scale`, `shift` fp32 `[C]`."""
    x = window.rows()
    out = torch.addcmul(shift[:, None, None], x, scale[:, None, None], out=torch.empty_like(x))  # no map in fp32
    return _border(F.silu(out, inplace=True), window)


def bordered(window: Window) -> Tensor:
    """`[1, C, h + 2, w + 2]`: the window's strip, its neighbours' rows above and below, zeros beyond the picture."""
    return _border(window.rows(), window)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor | None = None, groups: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The 3 x 3 convolution of a bordered `x` `[1, C, h + 2, w + 2]`, `[1, N, h, w]`, and its `group_moments`.

    It is added onto `onto`, in place, if that is given. No moments for 0 groups.
    """
    out = F.conv2d(x, weight, bias)
    if onto is not None:
        out = onto.add_(out)
    return out, group_moments(out, groups) if groups else None


def corner_taps(weight: Tensor) -> Tensor:
    """`weight` `[N, C, 3, 3]` as `convolve_doubled` takes it."""
    return weight


def convolve_doubled(x: Tensor, taps: Tensor, bias: Tensor, groups: int = 0) -> tuple[Tensor, Tensor | None]:
    """As `convolve`, of a bordered `x` whose pixels are doubled in both directions: `[1, N, 2 h, 2 w]`."""
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return convolve(doubled[:, :, 1:-1, 1:-1], taps, bias, groups=groups)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head over all positions, each `[L, C]`."""
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


def _border(x: Tensor, window: Window) -> Tensor:
    return F.pad(x, (1, 1, int(window.above is None), int(window.below is None)))


def row_scales(absmax: Tensor) -> Tensor:
    """fp32 `[N]`: what `decode` divides by so that each row fills fp8's range. The largest level of NF4 is 1."""
    return absmax.amax(dim=1).clamp_min(SMALLEST) / FP8_MAX


def _write(y: Tensor, out: Operand) -> None:
    if out.scale is not None:
        scale = y.abs().amax(dim=-1).clamp_min(SMALLEST) / FP8_MAX
        out.scale.copy_(scale)
        y = y * (1 / scale)[..., None]
    out.values.copy_(y)
