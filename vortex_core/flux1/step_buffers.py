"""The buffers that one step works in: every intermediate of the transformer, laid out once for a size.

Legend as in flux1/transformer.py. Text and image of a picture are rows of the same buffers, and buffers are reused as
soon as their values are no longer needed. In 16 bits the product that widens also applies the GELU, and the next
product reads where this one wrote: q, k, v and the MLP lie apart. In 8 bits the operands of products have buffers of
their own, half as large. In fp8 the heads for attention lie where the MLP's operand will be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Heads, Kernels, ScaledTensor
from ..kernels.scaled_tensor import TILE
from ..memory.arena import Shape, round_up
from ..quant.precision import EXACT, Precision
from .spec import FluxSpec


class StepSize(NamedTuple):
    """Of a step: pictures, tokens of text and of the image. `away`: of the text, those to avoid, which come first."""

    pictures: int
    txt: int
    img: int
    away: int = 0


Size = tuple[int, int, int] | StepSize
Rope = tuple[Tensor, Tensor]  # cos and sin, fp32, each [L, C/2]
Take = Callable[[str, tuple[int, ...], torch.dtype], Tensor]  # name, shape and type to an uninitialized tensor


@dataclass(slots=True)
class TokenStream:
    """The buffers' views for one sequence: text, image, or both (tokens `start` to `stop` of the joint sequence)."""

    start: int
    stop: int
    x: Tensor  # [B, T, D], the residual stream
    normal: ScaledTensor  # [B, T, D], adaLN of `x`: the next product's operand
    qkv: Tensor  # [B, T, 3, H, C]
    wide: Tensor  # [B, T, M], inside the MLP
    active: ScaledTensor | None  # in 8 bits: [B, T, M] after the GELU; for both [B, T, D + M], attention in front
    attn: ScaledTensor | None  # in 8 bits: [B, T, D]; in 16 bits attention's output is an operand as it is
    y: Tensor  # [B, T, D], what is added to `x`
    pe: Rope = field(init=False)  # of its tokens, set by `StepBuffers.place`

    def pack(self, attn: Tensor, kernels: Kernels) -> ScaledTensor:
        """This stream's part of attention's output `[B, L, D]`, as an operand."""
        part = attn[:, self.start : self.stop]
        if self.attn is None:
            return ScaledTensor(part)
        kernels.quantize(part, self.attn)
        return self.attn

    def activate(self, kernels: Kernels, attn: Tensor | None = None) -> list[ScaledTensor]:
        """The operands of the next product: attention's output, if given, and `wide` after the GELU.

        In 16 bits the product that wrote `wide` has applied the GELU.
        """
        if self.active is None:
            return [ScaledTensor(part) for part in (attn, self.wide) if part is not None]
        kernels.gelu(self.wide, self.active, before=attn)
        return [self.active]


class _Views:
    """Views into the flat buffers of `batch` pictures."""

    def __init__(self, flat: Mapping[str, Tensor], batch: int, *, scaled: bool) -> None:
        self._flat, self._batch, self._scaled = flat, batch, scaled

    def plain(self, name: str, *shape: int, skip: int = 0) -> Tensor:
        """`[B, *shape]`, which starts behind B times `skip` values."""
        start, whole = self._batch * skip, (self._batch, *shape)
        return self._flat[name][start : start + prod(whole)].view(whole)

    def operand(self, name: str, rows: int, width: int, start: int = 0, skip: int = 0) -> ScaledTensor:
        """`[B, rows, width]` behind B times `start` rows and `skip` values; in 8 bits with scales."""
        scale = None
        if self._scaled:  # rounded, since the library wants vectors of scales aligned
            scale = self.plain(f"{name}_scale", _rounded(rows), skip=_rounded(start))[:, :rows]
        return ScaledTensor(self.plain(name, rows, width, skip=skip + start * width), scale)


class StepBuffers:
    """Buffers for B pictures, N text and S image tokens, from `take`, for products in `precision`."""

    def __init__(
        self,
        spec: FluxSpec,
        kernels: Kernels,
        size: Size,
        dtype: torch.dtype,
        take: Take,
        precision: Precision = EXACT,
        *,
        side: torch.cuda.Stream | None = None,
    ) -> None:
        """`size`: B, N, S. `side`: a second CUDA stream, for the text."""
        self.size, scaled = StepSize(*size), precision.scaled
        batch, txt_tokens, img_tokens, away = self.size
        tokens, hidden, mlp = txt_tokens + img_tokens, spec.hidden, spec.mlp
        head = (3, spec.heads, spec.head_dim)
        flat = {name: take(name, *shape) for name, shape in buffers(spec, size, dtype, precision).items()}
        views = _Views(flat, batch, scaled=scaled)
        x, qkv = views.plain("x", tokens, hidden), views.plain("linear1", tokens, *head)

        def stream(start: int, stop: int) -> TokenStream:
            rows = stop - start  # text and image have their own: they run at the same time
            return TokenStream(
                start,
                stop,
                x=x[:, start:stop],
                normal=views.operand("normal", rows, hidden, start),
                qkv=qkv[:, start:stop],
                wide=views.plain("linear1", rows, mlp, skip=tokens * 3 * hidden + start * mlp),
                active=views.operand("active", rows, mlp, start) if scaled else None,
                attn=views.operand("active", rows, hidden, start, skip=tokens * mlp) if scaled else None,
                y=views.plain("y", rows, hidden, skip=start * hidden),
            )

        self.kernels, self._side, self.qkv = kernels, side, qkv
        self.txt, self.img, self.joint = stream(0, txt_tokens), stream(txt_tokens, tokens), stream(0, tokens)
        self.linear1 = [self.joint.qkv.flatten(2), self.joint.wide]
        if scaled:  # linear1 is one product, and linear2 has one operand
            whole = views.plain("linear1", tokens, 3 * hidden + mlp)
            self.linear1 = [whole]
            self.joint = replace(
                self.joint,
                qkv=whole[..., : 3 * hidden].unflatten(-1, head),
                wide=whole[..., 3 * hidden :],
                active=views.operand("active", tokens, hidden + mlp),
            )
        self.heads: Heads | None = None
        if precision.fp8_attention and not away:
            self.heads = _heads(flat["active"], flat["v_scale"], (batch, tokens, *head[1:]))
        self.apart = views.plain("apart", tokens - (txt_tokens - away), *head) if away else None
        self.nag: Tensor | None = None  # the terms of `reference.guide`
        self.final = ScaledTensor(views.plain("linear1", img_tokens, hidden))
        self.velocity = views.plain("velocity", img_tokens, spec.in_channels)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, kernels are launched on the side stream: they run beside those launched next, until `meet`."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield

    def meet(self) -> None:
        """Let what is launched from now on wait for the side stream."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    @property
    def txt_scratch(self) -> int:
        """The scratch buffer (`Backend.using`) for the text's weights: its own where it runs beside the image."""
        return int(self._side is not None)

    def place(self, pe: Rope) -> None:
        """Set the positions of the tokens, `[L, C/2]`."""
        for stream in (self.txt, self.img, self.joint):
            stream.pe = (pe[0][stream.start : stream.stop], pe[1][stream.start : stream.stop])


def buffers(spec: FluxSpec, size: Size, dtype: torch.dtype, precision: Precision = EXACT) -> dict[str, Shape]:
    """Shape and type of every buffer of a step. All are flat."""
    batch, txt_tokens, img_tokens, away = StepSize(*size)
    rows = batch * (txt_tokens + img_tokens)
    flat: dict[str, Shape] = {
        "x": ((rows * spec.hidden,), dtype),
        "y": ((rows * spec.hidden,), dtype),
        "normal": ((rows * spec.hidden,), precision.operand or dtype),
        "linear1": ((rows * (3 * spec.hidden + spec.mlp),), dtype),
        "velocity": ((batch * img_tokens * spec.in_channels,), dtype),
    }
    if precision.operand is not None:
        active = rows * (spec.hidden + spec.mlp)
        if (
            precision.fp8_attention and not away
        ):  # the MLP's operand, or the heads, with the values' tokens in whole tiles
            values = batch * round_up(txt_tokens + img_tokens, TILE)
            active = max(active, (2 * rows + values) * spec.hidden)
            flat["v_scale"] = ((values // TILE * spec.heads + 2,), torch.float32)
        flat["active"] = ((active,), precision.operand)
        scales = batch * (_rounded(txt_tokens) + _rounded(img_tokens))
        flat["normal_scale"] = flat["active_scale"] = ((scales,), torch.float32)
    if away:  # queries, keys and values of the text to avoid and of the image
        flat["apart"] = ((batch * (away + img_tokens) * 3 * spec.hidden,), dtype)
    return flat


def _heads(active: Tensor, v_scale: Tensor, shape: tuple[int, int, int, int]) -> Heads:
    """Heads of `shape` `[B, L, H, C]` in the memory of `active`, which is free during attention."""
    batch, tokens, heads, channels = shape
    tiles = round_up(tokens, TILE) // TILE
    q, k, v = active.split([prod(shape), prod(shape), len(active) - 2 * prod(shape)])
    scales = batch * heads * tiles
    return Heads(
        q.view(shape),
        k.view(shape),
        v[: batch * heads * channels * tiles * TILE].view(batch, heads, channels, tiles * TILE),
        v_scale[:scales].view(batch, heads, tiles),
        v_scale[scales:][:2],
    )


def _rounded(rows: int) -> int:
    """`rows`, up to where the library takes a vector of scales."""
    return round_up(rows, 16)
