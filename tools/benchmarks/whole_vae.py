"""The VAE decoder as a naive reference for decoding in strips: whole maps, torch's own GroupNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

from vortex_core.flux1.vae import Decoder
from vortex_core.flux1.vae_blocks import AttnBlock, ResnetBlock


def whole_decode(decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, H, W, 3]` in 0..1 of clean latents `[B, 16, H/8, W/8]` in the model's scale."""

    def resnet(block: ResnetBlock, x: torch.Tensor) -> torch.Tensor:
        h = block.conv1(F.silu(block.norm1(x)))
        h = block.conv2(F.silu(block.norm2(h)))
        return h + (block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x)

    def attend(block: AttnBlock, x: torch.Tensor) -> torch.Tensor:
        tokens = rearrange(block.norm(x), "b c h w -> b 1 (h w) c")
        h = block.proj_out(F.scaled_dot_product_attention(block.q(tokens), block.k(tokens), block.v(tokens)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])

    spec, mid = decoder.spec, decoder.mid
    x = decoder.conv_in(latents.to(decoder.conv_in.weight.dtype) / spec.scale + spec.shift)
    x = resnet(mid.block_2, attend(mid.attn_1, resnet(mid.block_1, x)))
    for level in reversed(decoder.up):
        for block in level.block:
            x = resnet(block, x)
        if hasattr(level, "upsample"):
            x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    x = decoder.conv_out(F.silu(decoder.norm_out(x)))
    return (x.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
