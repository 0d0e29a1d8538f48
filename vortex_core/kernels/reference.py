"""The kernels in plain torch: they define each one, are the oracle of the fused ones, and run where those cannot.

Legend: B pictures, T tokens of text or image, D hidden, H heads, C channels of a head. Arithmetic is fp32, rounded
once. The decoder's maps `[1, C, h, w]` have their channels last.

On a card, functions go through tokens or rows in chunks, so that their allocations have a bound: `step_bytes`,
`strip_bytes`, `attention_bytes` and `nf4.DEQUANTIZE_BYTES`. Those for fp8 have none: no card without fused kernels
uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nf4
from . import rotation
from .adapter import Adapter
from .scaled_tensor import FP8_MAX, SMALLEST, TILE, Heads, Moments, ScaledTensor, Window, chunk_rows

EPSILON = 1e-6  # of every norm in FLUX
TOKENS = 1024  # of all pictures together, that a step's functions take at once
ROWS = 256  # of a weight, that are rotated at once
LEAST_NORM = 1e-6  # that a token is divided by
EXACT = 1024  # products of two int8 values, whose sum in fp32 is exact


def dequantize(
    packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None = None, adapter: Adapter | None = None
) -> None:
    """NF4 (uint8 `[N, K/2]`, fp32 `[N, K/64]`) to `out` `[N, K]`, divided by `row_scale` (fp32 `[N]`) if given.

    To int8, which needs a `row_scale`: rotated (see `rotation`), divided, and rounded to nearest even. The update of
    an `adapter` is added before.
    """
    if adapter is not None:
        dtype = out.dtype if out.dtype.itemsize == 1 else None
        for rows, place, *scale in zip(
            _adapted_rows(packed, absmax, adapter, dtype), *_in_parts(out, *_given(row_scale)), strict=True
        ):
            rows = rows if not scale else rows / scale[0][:, None]
            place.copy_(rows.round_() if dtype == torch.int8 else rows)
        return
    if out.dtype == torch.int8:
        assert row_scale is not None
        absmax = absmax * (1 / (row_scale * rotation.block(out.shape[1]) ** 0.5))[:, None]
        for rows, place in zip(_rotated_rows(packed, absmax), *_in_parts(out), strict=True):
            place.copy_(rows.round_())
        return
    if row_scale is not None:
        absmax = absmax / row_scale[:, None]
    nf4.dequantize(nf4.NF4Weight(packed, absmax), out.dtype, out)


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None) -> None:
    """What `dequantize` to `dtype` (fp8 or int8) divides each row by, to `out` fp32 `[N]`: then it fills the range."""
    if adapter is not None:
        most = rotation.INT8_MAX if dtype == torch.int8 else FP8_MAX
        for rows, place in zip(_adapted_rows(packed, absmax, adapter, dtype), *_in_parts(out), strict=True):
            place.copy_(rows.abs().amax(dim=1).clamp_min(SMALLEST) / most)
        return
    if dtype != torch.int8:  # NF4's largest level is 1
        out.copy_(absmax.amax(dim=1).clamp_min(SMALLEST) / FP8_MAX)
        return
    unit = rotation.unit(packed.shape[1] * 2)
    for rows, place in zip(_rotated_rows(packed, absmax), *_in_parts(out), strict=True):
        place.copy_(rows.abs().amax(dim=1).clamp_min(SMALLEST) * unit)


def multiply_int8(
    x: Tensor, x_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """`x` int8 `[M, K]` times `weight` int8 `[N, K]`, with scales fp32 `[M]` and `[N]`, and `bias` `[N]`, to `out`.

    Sums are exact integers. `out` `[M, N]` is rounded once. Rows may lie apart in `weight` and `out`.
    """
    summed = x.new_zeros(out.shape, dtype=torch.int32)
    for start in range(0, x.shape[1], EXACT):  # of so many, fp32 makes no error
        part = slice(start, start + EXACT)
        summed += (x[:, part].float() @ weight[:, part].float().t()).int()
    y = summed.float().mul_(x_scale[:, None]).mul_(row_scale)
    out.copy_(y if bias is None else y.add_(bias))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """adaLN: layer norm without weights, then `(1 + scale) * x + shift`. `x` `[B, T, D]`, `shift`, `scale` `[D]`."""
    shift, factor = shift.float(), 1 + scale.float()
    for start, stop in _chunks(x):
        _write(_normal(x[:, start:stop]).mul_(factor).add_(shift), out.tokens(start, stop), x.dtype)


def residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """`x += gate * y` in place, then `modulate`: the end of one branch, and the start of the next."""
    gate = gate.float()
    for start, stop in _chunks(x):
        part = x[:, start:stop]
        part.copy_(y[:, start:stop].to(torch.float32, copy=True).mul_(gate).add_(part))
    modulate(x, shift, scale, out)


def gelu(x: Tensor, out: ScaledTensor, before: Tensor | None = None) -> None:
    """GELU (tanh form) of `x` `[B, T, W]` to 8 bits, a scale for each token; `before` `[B, T, A]` in front of it."""
    y = F.gelu(x.float(), approximate="tanh")
    _write(y if before is None else torch.cat((before.float(), y), dim=-1), out, x.dtype)


def quantize(x: Tensor, out: ScaledTensor) -> None:
    """`x` `[B, T, K]` to 8 bits with a scale for each token."""
    _write(x.float(), out, x.dtype)


def rotate(qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """RMS norm over a head and rotary embedding, in place on q and k of `qkv` `[B, T, 3, H, C]`.

    FLUX pairs channels (2c, 2c+1). `query_norm`, `key_norm` `[C]`; `cos`, `sin` fp32 `[T, C/2]`.
    """
    cos, sin = cos[:, None], sin[:, None]
    for x, norm in ((qkv[:, :, 0], query_norm.float()), (qkv[:, :, 1], key_norm.float())):
        for start, stop in _chunks(x):
            _turn(x[:, start:stop], norm, cos[start:stop], sin[start:stop])


def guide(wanted: Tensor, avoided: Tensor, terms: Tensor, out: Tensor) -> None:
    """Normalized attention guidance: what attention found with the prompt, led away from that with another text.

    All `[B, T, D]`, `out` too; `terms` are fp32 `[3]`: scale, tau, alpha. The difference counts `scale` times, the L1
    norm of a token grows at most `tau` times, and `alpha` of the result is blended in (arXiv 2505.21179, section 3.2).
    """
    scale, tau, alpha = terms
    for start, stop in _chunks(wanted):
        plain, led = (x[:, start:stop].to(torch.float32, copy=True) for x in (wanted, avoided))
        led.lerp_(plain, scale)  # scale * wanted - (scale - 1) * avoided
        before, after = (torch.linalg.vector_norm(x, 1, -1, keepdim=True).clamp_min_(LEAST_NORM) for x in (plain, led))
        ratio = after.div_(before)
        out[:, start:stop].copy_(plain.mul_(1 - alpha).add_(led.mul_(ratio.clamp_max(tau).div_(ratio).mul_(alpha))))


def step_bytes(hidden: int) -> int:
    """Bytes that `guide`, `modulate`, `residual_modulate` and `rotate` allocate at most; `hidden`: D, and H times C."""
    # two chunks in fp32 (or one, and its two halves); moments of tokens and heads; rows as long as a token
    return TOKENS * (2 * 4 * hidden + hidden // 2) + 4 * 4 * hidden


def pack_heads(qkv: Tensor, norms: Sequence[Tensor], boundary: int, cos: Tensor, sin: Tensor, heads: Heads) -> None:
    """`rotate` of `qkv` `[B, L, 3, H, C]`, and all of it to fp8.

    `norms`: of queries and of keys before token `boundary`, then of those from it on. Queries and keys are scaled by a
    bound that none can exceed, so that no pass looks for the largest; values by the largest of a tile.
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


def group_moments(x: Tensor, moments: Moments) -> None:
    """Append the moments of `x` `[1, C, h, w]`, rows of a map, to `moments`, in one part or more (see `most_parts`)."""
    groups = moments.values.shape[1]
    rows = x[0].permute(1, 2, 0).unflatten(-1, (groups, -1))  # [h, w, G, C/G]
    for part in rows.split(chunk_rows(rows[0].numel())):
        variance, mean = torch.var_mean(part.float(), dim=(0, 1, 3), correction=0)
        count = part.numel() // groups
        place = moments.values[:, :, moments.take(1)]
        place[0].fill_(count)
        place[1].copy_(mean)
        place[2].copy_(variance.mul_(count))


def norm_terms(moments: Moments, weight: Tensor, bias: Tensor, epsilon: float, out: Tensor) -> None:
    """Scale and shift, to `out` fp32 `[2, C]`, of the group norm of a map (moments joined as in Chan et al., 1979)."""
    count, mean, square = moments.values[:, :, : moments.parts]
    total = count.sum(1)
    joint = (count * mean).sum(1) / total
    variance = (square + count * (mean - joint[:, None]).square()).sum(1) / total
    channels = len(weight) // len(total)
    scale = weight.float() * (variance + epsilon).rsqrt().repeat_interleave(channels)
    out[0].copy_(scale)
    out[1].copy_(bias.float() - joint.repeat_interleave(channels) * scale)


def norm_silu(window: Window, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """`silu(x * scale + shift)` of the window's rows, bordered as by `bordered`; `scale`, `shift` fp32 `[C]`."""
    for rows, place in _inside(window, out):
        torch.addcmul(shift[:, None, None], rows, scale[:, None, None], out=place)  # makes no map in fp32
        F.silu(place, inplace=True)


def bordered(window: Window, out: Tensor) -> None:
    """To `out` `[1, C, h + 2, w + 2]`: a strip, its neighbours' rows above and below, zeros beyond the picture."""
    for rows, place in _inside(window, out):
        place.copy_(rows)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None, *, add: bool = False
) -> None:
    """The 3 x 3 convolution of a bordered `x` `[1, C, h + 2, w + 2]`, to `out` `[1, N, h, w]` or added to it.

    The `group_moments` of `out` are appended to `moments`, if given.
    """
    height = out.shape[2]
    step = chunk_rows(out.shape[1] * out.shape[3])
    for top in range(0, height, step):
        found = F.conv2d(x[:, :, top : top + step + 2], weight, bias)
        place = out[:, :, top : top + step]
        place.add_(found) if add else place.copy_(found)
        del found  # before the next chunk is made
    if moments is not None:
        group_moments(out, moments)


def corner_taps(weight: Tensor, out: Tensor) -> None:
    """`weight` `[N, C, 3, 3]` as `convolve_doubled` takes it, to `out` `[4 N, 4 C]`: here unchanged, at its start."""
    _weight_in(out).copy_(weight)


def convolve_doubled(x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None) -> None:
    """As `convolve`, of a bordered `x` whose pixels are doubled in both directions: `out` is `[1, N, 2 h, 2 w]`."""
    weight = _weight_in(taps)
    height = out.shape[2] // 2
    step = chunk_rows(2 * out.shape[1] * out.shape[3])
    for top in range(0, height, step):
        doubled = F.interpolate(x[:, :, top : top + step + 2], scale_factor=2.0, mode="nearest")
        # one column too many on either side: they are cut off after, as a cut input would have to be copied
        found = F.conv2d(doubled[:, :, 1:-1], weight, bias)
        out[:, :, 2 * top : 2 * (top + step)] = found[..., 1:-1]
        del doubled, found
    if moments is not None:
        group_moments(out, moments)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Attention of one head over all positions, each `[L, C]`, to `out`."""
    out.copy_(F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0])


def strip_bytes(inside: int, outside: int, width: int, itemsize: int, *, doubled: bool = False) -> int:
    """Bytes that a norm, `convolve` or `convolve_doubled`, and `group_moments` allocate at most.

    For maps of `inside` channels and this `width`, whatever their height, convolved to `outside` channels.
    """
    scale = 2 if doubled else 1
    rows = chunk_rows(scale * scale * width * outside)
    found = scale * rows * width * scale * outside
    if doubled:
        found = 2 * rows * (2 * width + 2) * outside + (2 * rows + 4) * (2 * width + 4) * inside
    values = max(chunk_rows(row) * row for row in (width * inside, scale * width * outside))
    return max(itemsize * found, 4 * values) + 2**18  # and small moments


def attention_bytes(tokens: int, channels: int, itemsize: int) -> int:
    """Bytes that `attend` allocates at most: the result, its sums in fp32, and statistics of each token."""
    return tokens * (channels * (itemsize + 4) + 2 * 4)


def _chunks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Spans of tokens of `x` `[B, T, ...]`, each with `TOKENS` of all pictures together."""
    batch, tokens = x.shape[:2]
    step = max(1, TOKENS // batch)
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


def _normal(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)


def _turn(x: Tensor, norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate` of queries or keys `[B, T, H, C]`."""
    normal = F.rms_norm(x.float(), x.shape[-1:], eps=EPSILON).mul_(norm)
    even, odd = normal.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = x.unflatten(-1, (-1, 2))
    pairs[..., 0] = (even * cos).sub_(odd * sin)
    pairs[..., 1] = (even * sin).add_(odd * cos)


def _inside(window: Window, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The window's parts and their places in `out`. Zeros are written at the sides, and for a part that is None."""
    out[..., 0].zero_()
    out[..., -1].zero_()
    inner = out[..., 1:-1]
    for rows, place in zip(window, (inner[:, :, :1], inner[:, :, 1:-1], inner[:, :, -1:]), strict=True):
        if rows is None:
            place.zero_()
        else:
            yield rows, place


def _weight_in(taps: Tensor) -> Tensor:
    """`[N, C, 3, 3]`, channels last, at the start of the `[4 N, 4 C]` that fused kernels need."""
    wide, channels = taps.shape[0] // 4, taps.shape[1] // 4
    return taps.flatten()[: 9 * wide * channels].view(wide, 3, 3, channels).permute(0, 3, 1, 2)


def _write(y: Tensor, out: ScaledTensor, dtype: torch.dtype) -> None:
    """fp32 `y` to `out`. For int8 it is first rounded to `dtype`, as it would be without int8, and rotated."""
    if out.values.dtype == torch.int8:
        assert out.scale is not None
        y = rotation.sums(y.to(dtype).float())
        largest = y.abs().amax(dim=-1).clamp_min(SMALLEST)
        out.scale.copy_(largest * rotation.unit(y.shape[-1]))
        y = (y * (rotation.INT8_MAX / largest)[..., None]).round_()
    elif out.scale is not None:
        scale = y.abs().amax(dim=-1).clamp_min(SMALLEST) / FP8_MAX
        out.scale.copy_(scale)
        y = y * (1 / scale)[..., None]
    out.values.copy_(y)


def _rotated_rows(packed: Tensor, absmax: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, fp32, rotated without 1 / sqrt(width). Levels are those of fp16, so that sums are exact."""
    levels = torch.tensor(nf4.LEVELS, device=packed.device).half().float()
    for codes, scale in zip(*_in_parts(packed, absmax), strict=True):
        both = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1)
        yield rotation.sums(levels[both.int()], scale)


def _adapted_rows(packed: Tensor, absmax: Tensor, adapter: Adapter, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Some rows at a time, fp32, with their update, for int8 rotated."""
    start = 0
    for codes, scale in zip(*_in_parts(packed, absmax), strict=True):
        rows = torch.empty(len(codes), 2 * codes.shape[1], device=codes.device)
        nf4.dequantize(nf4.NF4Weight(codes, scale), rows.dtype, rows)
        rows += adapter.rows(start, start + len(codes))
        start += len(codes)
        yield rotation.rotated(rows) if dtype == torch.int8 else rows


def _given(row_scale: Tensor | None) -> tuple[Tensor, ...]:
    return () if row_scale is None else (row_scale,)


def _in_parts(*matrices: Tensor) -> list[tuple[Tensor, ...]]:
    return [matrix.split(ROWS) for matrix in matrices]
