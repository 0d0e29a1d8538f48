"""The VAE decoder: latents in the model's scale to pictures. Layout and names are BFL's.

Legend: B pictures, H and W in pixels; latents are [B, 16, H/8, W/8]; a `Map` is a feature map in strips. Its layers are
those of flux1/vae_blocks.py; flux1/decoder_memory.py computes where their maps lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Conv2d

from ..kernels import Kernels
from ..utils.timing import mark
from .decoder_memory import DecoderLayout, DecoderMemory
from .spec import VaeSpec
from .strip_memory import Map
from .vae_blocks import Convolution, Mid, Norm, ResnetBlock, SiluGroupNorm, StripModule


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels)

    def forward(self, x: Map, out: Map, memory: DecoderMemory) -> Map:
        """Twice the height and width, in `out`, which overwrites `x`. A strip becomes one strip, or two."""
        conv, kernels, moments = self.conv, self.conv.kernels, memory.moments()
        taps = memory.taps(conv.weight)
        kernels.corner_taps(conv.weight, taps)
        strips = iter(out.strips)
        for window in memory.windows(x.strips, overwritten=True):
            _, channels, rows, width = window.strip.shape
            bordered = memory.bordered(channels, rows, width)
            kernels.bordered(window, bordered)
            while rows:  # rows of the window that are not doubled yet
                strip = next(strips)
                part = bordered[:, :, -rows - 2 :][:, :, : strip.shape[2] // 2 + 2]
                conv.doubled(taps, part, strip, moments)
                rows -= strip.shape[2] // 2
        return Map(out.strips, moments)


class UpLevel(nn.Module):
    """One resolution: its residual blocks, then upsampling, except at the last level."""

    def __init__(self, inside: int, outside: int, spec: VaeSpec, *, last: bool) -> None:
        super().__init__()
        widths = [inside] + [outside] * spec.layers
        self.block = nn.ModuleList(ResnetBlock(width, outside, spec.groups) for width in widths)
        if not last:
            self.upsample = Upsample(outside)

    def forward(self, x: Map, k: int, memory: DecoderMemory) -> Map:
        """Run level `k`: `inside` channels to `outside`, and upsample for the next level, if there is one."""
        out, between = memory.residual(k), memory.other(k)
        for block in self.block:
            x = block(x, between, out, memory)
        return self.upsample(x, memory.arrival(k + 1), memory) if hasattr(self, "upsample") else x


class Decoder(StripModule):
    """FLUX's VAE decoder. Levels are numbered as in the checkpoint: `up.3` is the lowest resolution and runs first."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
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

    def forward(self, memory: DecoderMemory) -> None:
        """Decode `memory.latent`, in the model's scale, to `colours(memory)`. The latent is overwritten."""
        latent = memory.latent.div_(self.spec.scale).add_(self.spec.shift)
        lowest, between = memory.lowest()
        lowest.strips[0].copy_(self.conv_in(latent))
        self.mid(lowest, between, memory)
        x = memory.residual(0)
        for k, level in enumerate(reversed(self.up)):
            x = level(x, k, memory)
        norm = Norm(self.norm_out, x, memory)
        for window, strip in zip(memory.windows(x.strips), self.colours(memory), strict=True):
            self.conv_out.strip(norm(window), strip)

    def colours(self, memory: DecoderMemory) -> Sequence[Tensor]:
        """Where `forward` writes the picture: strips `[1, 3, rows, W]` in about -1..1, top to bottom.

        They are valid until the next picture is decoded.
        """
        return memory.other(len(self.up) - 1, channels=3).strips


def decode(
    decoder: Decoder,
    latents: Tensor,
    out: Tensor,
    rows: int | None = None,
    memory: Tensor | None = None,
    launch: Callable[[Callable[[], None]], None] | None = None,
) -> Tensor:
    """Write pictures into `out`, float32 `[B, H, W, 3]` in 0..1, and return it.

    `latents`: fp32 `[B, 16, H/8, W/8]`, neither in `memory` nor in `out`. `rows`: of a strip, at most; None: one strip.
    `memory`: uint8, one dimension, at least `DecoderLayout.nbytes`, on the decoder's device; None: allocated for the
    call. Raises `ValueError` where it is too small. `launch`: calls the function that decodes one picture, or has the
    device do the same. Pictures are decoded one by one: a batch would take B times the memory and gain little.
    """
    weight = decoder.conv_in.weight
    layout = DecoderLayout(decoder.spec, latents.shape[2], latents.shape[3], rows, weight.dtype)
    if memory is None:
        memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=weight.device)
    places = DecoderMemory(layout, memory)
    strips = decoder.colours(places)
    for picture, latent in zip(out, latents, strict=True):
        places.latent[0].copy_(latent)
        if launch is None:
            decoder(places)
        else:
            launch(partial(decoder, places))
        top = 0
        for strip in strips:
            colours = picture[top : top + strip.shape[2]]
            colours.copy_(rearrange(strip, "1 c h w -> h w c")).mul_(0.5).add_(0.5).clamp_(0, 1)
            top += len(colours)
    mark("decode")
    return out


def library_bytes(spec: VaeSpec, height: int, width: int, dtype: torch.dtype, kernels: Kernels | None) -> int:
    """The most bytes that torch's operations allocate while a picture is decoded, besides its `memory`.

    `height`, `width`: those of the latents. The first convolution takes its result and a copy of its input. The mid
    block's norm takes its result and a copy of the map, since CUDA's norm needs channels first. `kernels` take what
    they say; None: nothing.
    """
    itemsize, lowest = dtype.itemsize, spec.channels[-1]
    lowest_map = height * width * lowest * itemsize
    sizes = [2 * lowest_map + lowest_map // 16]
    if kernels is None:
        return max(sizes) + 2**20
    sizes.append(kernels.attention_bytes(height * width, lowest, itemsize))
    levels = DecoderLayout(spec, height, width, None, dtype).levels
    for level in levels:
        for arriving in (level.arriving, level.channels):
            sizes.append(kernels.strip_bytes(arriving, level.channels, level.width, itemsize))
    for level in levels[:-1]:
        sizes.append(kernels.strip_bytes(level.channels, level.channels, level.width, itemsize, doubled=True))
    return max(sizes) + 2**20  # statistics and other small things
