"""Attention of a step: of one text and the image, or of two texts, of which one is to be avoided (NAG).

Legend as in flux1/transformer.py. With NAG, image tokens attend twice, to themselves with each of the texts, and what
they find is led away from the text to avoid (`reference.guide`). All else runs once, for both texts: that costs a part
of what a second pass does. The text to avoid is modulated as the prompt is; in the paper's model it has the modulation
of its own pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .step_buffers import StepBuffers, TokenStream

if TYPE_CHECKING:
    from .transformer import QKNorm


def attend(step: StepBuffers, qkv: Tensor, parts: Sequence[tuple[TokenStream, QKNorm]]) -> Tensor:
    """Attention over `qkv` `[B, L, 3, H, C]`, of one or two streams with their own norms, to `[B, L, D]`.

    In fp8, and with NAG, the result overwrites the queries. In 16 bits the library attends (`attention`).
    """
    if step.heads is not None:
        ends = (parts[0][1], parts[-1][1])
        norms = [weight.scale for norm in ends for weight in (norm.query_norm, norm.key_norm)]
        step.kernels.pack_heads(qkv, norms, parts[-1][0].start, *step.joint.pe, step.heads)
        out = qkv[:, :, 0]
        step.kernels.attend_heads(step.heads, out)
        return out.flatten(2)
    for stream, norm in parts:
        cos, sin = stream.pe
        step.kernels.rotate(stream.qkv, norm.query_norm.scale, norm.key_norm.scale, cos, sin)
    return attend_apart(step, qkv) if step.size.away else attention(qkv)


def attention(qkv: Tensor) -> Tensor:
    """The library's attention over `[B, L, 3, H, C]`, to `[B, L, D]`, into memory that it allocates."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, H, L, C], where the products wrote them
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attend_apart(step: StepBuffers, qkv: Tensor) -> Tensor:
    """Attention over `qkv` `[B, L, 3, H, C]` of two texts, the one to avoid first, and image, to `[B, L, D]`.

    Each text attends to itself and the image. The result overwrites the queries.
    """
    assert step.apart is not None
    assert step.nag is not None
    away, texts = step.size.away, step.size.txt
    wanted = attention(qkv[:, away:])
    step.apart[:, :away].copy_(qkv[:, :away])
    step.apart[:, away:].copy_(qkv[:, texts:])
    avoided = attention(step.apart)
    out = qkv[:, :, 0].flatten(2)
    out[:, :away].copy_(avoided[:, :away])
    out[:, away:texts].copy_(wanted[:, : texts - away])
    step.kernels.guide(wanted[:, texts - away :], avoided[:, away:], step.nag, out[:, texts:])
    return out
