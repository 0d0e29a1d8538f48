"""The VAE decoder: latents in the model's scale to pictures. Layout and names are BFL's.

Legend: B pictures, H and W in pixels; latents are [B, 16, H/8, W/8].
Written out rather than taken from diffusers because decoding inside a VRAM budget needs to cut it open.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .latency import mark
from .spec import VaeSpec


class ResnetBlock(nn.Module):
    """Two norm-swish-convolutions around a skip."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outside, eps=1e-6)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inside, h, w]` to `[B, outside, h, w]`."""
        # inplace: at full size each extra copy of these maps costs 64 to 256 MB
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h.add_(skip)


class AttnBlock(nn.Module):
    """One head of attention over all positions. The checkpoint's 1x1 convolutions are linears here."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]`, same out."""
        tokens = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        out = self.proj_out(F.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens)))
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, 2h, 2w]`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    """The lowest level, with attention over the whole picture."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]`, same out."""
        return self.block_2(self.attn_1(self.block_1(x)))


class UpLevel(nn.Module):
    """One resolution: its residual blocks, then the way up to the next, but for the last."""

    def __init__(self, inside: int, outside: int, spec: VaeSpec, *, last: bool) -> None:
        super().__init__()
        widths = [inside] + [outside] * spec.layers
        self.block = nn.ModuleList(ResnetBlock(width, outside, spec.groups) for width in widths)
        if not last:
            self.upsample = Upsample(outside)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inside, h, w]` to `[B, outside, 2h, 2w]` (or `h, w` at the last level)."""
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """FLUX's VAE decoder. Levels are kept as in the checkpoint: `up.3` is the lowest resolution and runs first."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.scale, self.shift = spec.scale, spec.shift
        lowest = spec.channels[-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, lowest, 3, padding=1)
        self.mid = Mid(lowest, spec.groups)
        above = (*spec.channels[1:], lowest)  # the width that arrives at each level
        self.up = nn.ModuleList(
            UpLevel(arriving, width, spec, last=level == 0)
            for level, (arriving, width) in enumerate(zip(above, spec.channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(spec.groups, spec.channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(spec.channels[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents in the model's scale, `[B, 16, H/8, W/8]`, to pictures about -1..1, `[B, 3, H, W]`."""
        x = self.mid(self.conv_in(latents / self.scale + self.shift))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


def decode(decoder: Decoder, latents: Tensor, out: Tensor) -> Tensor:
    """Write pictures into `out`, float32 `[B, H, W, 3]` in 0..1, and return it.

    One picture at a time: activations of a batch would cost B times the memory and gain little.
    """
    dtype = decoder.conv_in.weight.dtype
    for picture, latent in zip(out, latents.to(dtype), strict=True):
        decoded = decoder(latent[None])[0]
        picture.copy_(rearrange(decoded, "c h w -> h w c").float().mul_(0.5).add_(0.5).clamp_(0, 1))
    mark("decode")
    return out
