"""Step time: FLUX's double and single blocks, from packed latents and modulation to a velocity.

Legend: B pictures, S image tokens, N text tokens, L = N + S, D hidden, H heads, C = D / H.
Names and fused layout are BFL's (`qkv`, `linear1`, `linear2`), so a released checkpoint maps one to one. What
depends on the prompt alone is not here: time, pooled text and every modulation linear run at prompt time
(conditioning.py), and a block takes its shifts, scales and gates as rows of the modulation table.
Modules are plain `nn.Linear`; loading swaps in NF4 (checkpoint/materialize.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .spec import FluxSpec

Rope = tuple[Tensor, Tensor]  # cos and sin, fp32, each [L, C/2]


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, with BFL's parameter name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, self.scale.shape, self.scale, eps=1e-6)


class QKNorm(nn.Module):
    """Norms of queries and keys over the channels of a head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)


class SelfAttention(nn.Module):
    """The attention weights of one stream of a double block."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.hidden, 3 * spec.hidden)
        self.norm = QKNorm(spec.head_dim)
        self.proj = nn.Linear(spec.hidden, spec.hidden)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, L, D]` to normalized q and k and plain v, each `[B, H, L, C]`."""
        return split_heads(self.qkv(x), self.heads, self.norm)


class DoubleBlock(nn.Module):
    """Image and text keep their own weights and meet in attention."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.img_attn = SelfAttention(spec)
        self.txt_attn = SelfAttention(spec)
        self.img_mlp = mlp(spec)
        self.txt_mlp = mlp(spec)

    def forward(self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, pe: Rope) -> tuple[Tensor, Tensor]:
        """`img [B, S, D]`, `txt [B, N, D]`, `img_mod` and `txt_mod` `[6, D]`; the new `img` and `txt`."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod

        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(txt, txt_shift1, txt_scale1))
        img_q, img_k, img_v = self.img_attn.project(modulate(img, img_shift1, img_scale1))
        q = torch.cat((txt_q, img_q), dim=2)
        k = torch.cat((txt_k, img_k), dim=2)
        v = torch.cat((txt_v, img_v), dim=2)
        txt_attn, img_attn = attention(q, k, v, pe).split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side behind one wide linear."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.widths = (3 * spec.hidden, spec.mlp)
        self.linear1 = nn.Linear(spec.hidden, sum(self.widths))
        self.linear2 = nn.Linear(spec.hidden + spec.mlp, spec.hidden)
        self.norm = QKNorm(spec.head_dim)

    def forward(self, x: Tensor, mod: Tensor, pe: Rope) -> Tensor:
        """`x [B, L, D]`, `mod [3, D]`; the new `x`."""
        shift, scale, gate = mod
        qkv, wide = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        attn = attention(*split_heads(qkv, self.heads, self.norm), pe)
        return x + gate * self.linear2(torch.cat((attn, F.gelu(wide, approximate="tanh")), dim=-1))


class FinalLayer(nn.Module):
    """The last norm and the projection to packed latents."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.hidden, spec.in_channels)


class Transformer(nn.Module):
    """The token half of FLUX: everything whose work grows with tokens and repeats each step."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.img_in = nn.Linear(spec.in_channels, spec.hidden)
        self.txt_in = nn.Linear(spec.context, spec.hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(spec) for _ in range(spec.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(spec) for _ in range(spec.single_blocks))
        self.final_layer = FinalLayer(spec)

    def forward(self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope) -> Tensor:
        """The velocity `[B, S, 64]` of packed latents `img [B, S, 64]` at one step.

        `txt` `[B, N, D]` is `txt_in` of the T5 embeddings: the same in every step, so the caller does it once.
        `modulation` is one step of the table, `[rows, D]`: 12 rows a double block, 3 a single block, 2 at the end.
        """
        img = self.img_in(img)
        row = 0
        for double in self.double_blocks:
            img, txt = double(img, txt, modulation[row : row + 6], modulation[row + 6 : row + 12], pe)
            row += 12
        x = torch.cat((txt, img), dim=1)
        for single in self.single_blocks:
            x = single(x, modulation[row : row + 3], pe)
            row += 3
        shift, scale = modulation[row : row + 2]
        return self.final_layer.linear(modulate(x[:, txt.shape[1] :], shift, scale))


def mlp(spec: FluxSpec) -> nn.Sequential:
    """FLUX's MLP; entries 0 and 2 carry the weights, as in the checkpoint's names."""
    return nn.Sequential(
        nn.Linear(spec.hidden, spec.mlp), nn.GELU(approximate="tanh"), nn.Linear(spec.mlp, spec.hidden)
    )


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm without weights, then `(1 + scale) * x + shift`. `x [B, L, D]`, the others `[D]`."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def split_heads(qkv: Tensor, heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, L, 3 D]` to normalized q and k and plain v, each `[B, H, L, C]`."""
    q, k, v = rearrange(qkv, "b l (three h c) -> three b h l c", three=3, h=heads)
    return norm.query_norm(q), norm.key_norm(k), v


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Rope) -> Tensor:
    """Rotary attention over `[B, H, L, C]`; returns `[B, L, D]`."""
    out = F.scaled_dot_product_attention(rotate(q, pe), rotate(k, pe), v)
    return rearrange(out, "b h l c -> b l (h c)")


def rotate(x: Tensor, pe: Rope) -> Tensor:
    """Rotary position embedding in fp32 on interleaved pairs (2c, 2c+1), as FLUX pairs them. `x [B, H, L, C]`."""
    cos, sin = pe
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
