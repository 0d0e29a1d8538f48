"""The VAE decoder: latents in the model's scale to pictures. Layout and names are BFL's.

Legend: B pictures, H and W in pixels; latents are [B, 16, H/8, W/8]; a `Map` is a feature map in strips (strips.py).
Written out rather than taken from diffusers because decoding inside a VRAM budget needs to cut it open.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, Linear

from .kernels import Kernels, reference
from .latency import mark
from .spec import VaeSpec
from .strips import Convolution, Map, Norm, SiluGroupNorm, Strip, halves, windows


class ResnetBlock(nn.Module):
    """Two norm-swish-convolutions around a skip."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.norm1 = SiluGroupNorm(groups, inside, eps=1e-6)
        self.conv1 = Convolution(inside, outside, groups)
        self.norm2 = SiluGroupNorm(groups, outside, eps=1e-6)
        self.conv2 = Convolution(outside, outside, groups)
        if inside != outside:
            self.nin_shortcut = Conv2d(inside, outside, 1)

    def forward(self, x: Map) -> Map:
        """`inside` channels to `outside`. `x` is written in place, or emptied where the width changes."""
        changes = hasattr(self, "nin_shortcut")
        norm = Norm(self.norm1, x)
        h: Map = []
        out: Map = [] if changes else x
        for window in windows(x, keep=not changes):
            h.append(self.conv1.strip(norm(window)))
            if changes:
                out.append(Strip(self._shortcut(window.strip)))
            del window
        norm = Norm(self.norm2, h)
        for i, window in enumerate(windows(h)):
            out[i] = self.conv2.strip(norm(window), onto=out[i])
            del window
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        """The 1 x 1 convolution, which is a product."""
        conv = self.nin_shortcut
        return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class AttnBlock(nn.Module):
    """One head of attention over all positions. The checkpoint's 1x1 convolutions are linears here."""

    kernels: Kernels = reference

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q = Linear(channels, channels)
        self.k = Linear(channels, channels)
        self.v = Linear(channels, channels)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[1, C, h, w]`, same out."""
        tokens = rearrange(self.norm(x), "1 c h w -> (h w) c")
        out = self.proj_out(self.kernels.attend(self.q(tokens), self.k(tokens), self.v(tokens)))
        return x + rearrange(out, "(h w) c -> 1 c h w", h=x.shape[2])


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, groups)

    def forward(self, x: Map, rows: int | None = None) -> Map:
        """Twice the height and width; a strip becomes two where it would have more than `rows`. `x` is emptied."""
        kernels, out = self.conv.kernels, []
        taps = kernels.corner_taps(self.conv.weight)
        for window in windows(x):
            height = window.strip.shape[2]
            cut = rows is not None and 2 * height > rows and height > 1
            for part in halves(window) if cut else (window,):
                out.append(self.conv.doubled(taps, kernels.bordered(part)))
                del part
            del window
        return out


class Mid(nn.Module):
    """The lowest level, with attention over the whole picture. It is small, and stays in one strip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """`[1, C, h, w]`, same out."""
        (strip,) = self.block_1([Strip(x)])
        (strip,) = self.block_2([Strip(self.attn_1(strip.x))])
        return strip.x


class UpLevel(nn.Module):
    """One resolution: its residual blocks, then the way up to the next, but for the last."""

    def __init__(self, inside: int, outside: int, spec: VaeSpec, *, last: bool) -> None:
        super().__init__()
        widths = [inside] + [outside] * spec.layers
        self.block = nn.ModuleList(ResnetBlock(width, outside, spec.groups) for width in widths)
        if not last:
            self.upsample = Upsample(outside, spec.groups)

    def forward(self, x: Map, rows: int | None = None) -> Map:
        """`inside` channels to `outside`, and to twice the height and width but at the last level; see `Upsample`."""
        for block in self.block:
            x = block(x)
        return self.upsample(x, rows) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """FLUX's VAE decoder. Levels are kept as in the checkpoint: `up.3` is the lowest resolution and runs first."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.scale, self.shift = spec.scale, spec.shift
        self._layout = torch.contiguous_format
        lowest = spec.channels[-1]
        self.conv_in = Conv2d(spec.latent_channels, lowest, 3, padding=1)
        self.mid = Mid(lowest, spec.groups)
        above = (*spec.channels[1:], lowest)  # the width that arrives at each level
        self.up = nn.ModuleList(
            UpLevel(arriving, width, spec, last=level == 0)
            for level, (arriving, width) in enumerate(zip(above, spec.channels, strict=True))
        )
        self.norm_out = SiluGroupNorm(spec.groups, spec.channels[0], eps=1e-6)
        self.conv_out = Convolution(spec.channels[0], 3)

    def use(self, kernels: Kernels) -> None:
        """Compute norms, convolutions and attention with `kernels`; the fused ones want `channels_last`."""
        for module in self.modules():
            if isinstance(module, SiluGroupNorm | Convolution | AttnBlock):
                module.kernels = kernels

    def channels_last(self) -> None:
        """Keep the convolutions' weights, and so all maps, with their channels last."""
        self._layout = torch.channels_last
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._layout)

    def forward(self, latents: Tensor, rows: int | None = None) -> Iterator[Tensor]:
        """One picture's latents in the model's scale, `[1, 16, H/8, W/8]`, to strips `[1, 3, rows, W]`, about -1..1.

        Top to bottom, in strips of at most `rows` rows of every map; None: whole, as one strip.
        """
        h = self.conv_in(latents / self.scale + self.shift)
        h = self.mid(h.contiguous(memory_format=self._layout))  # as cuDNN returns it; other libraries may not
        x: Map = [Strip(part) for part in h.split(rows or h.shape[2], dim=2)]
        del h
        for level in reversed(self.up):
            x = level(x, rows)
        norm = Norm(self.norm_out, x)
        for window in windows(x):
            yield self.conv_out.strip(norm(window)).x
            del window


def decode(decoder: Decoder, latents: Tensor, out: Tensor, rows: int | None = None) -> Tensor:
    """Write pictures into `out`, float32 `[B, H, W, 3]` in 0..1, and return it; in strips of at most `rows`, or whole.

    One picture at a time: activations of a batch would cost B times the memory and gain little.
    """
    dtype = decoder.conv_in.weight.dtype
    # a copy in any case: they may lie where the pictures go
    for picture, latent in zip(out, latents.to(dtype, copy=True), strict=True):
        top = 0
        for strip in decoder(latent[None], rows):
            colours = rearrange(strip[0], "c h w -> h w c").float().mul_(0.5).add_(0.5).clamp_(0, 1)
            picture[top : top + len(colours)].copy_(colours)
            top += len(colours)
            del strip, colours  # or they would lie in the next picture's way
    mark("decode")
    return out
