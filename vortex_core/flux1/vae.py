"""The VAE decoder: latents in the model's scale to pictures. Layout and names are BFL's.

Legend: B pictures, H and W in pixels; latents are [B, 16, H/8, W/8]; a `Map` is a feature map in strips. It is not
taken from diffusers, because decoding within a VRAM budget works strip by strip between places in one block of memory,
which flux1/decoder_memory.py computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, Linear

from ..kernels import Kernels, Moments, Window, reference
from ..utils.timing import mark
from .decoder_memory import DecoderLayout, DecoderMemory, Map
from .spec import VaeSpec


class SiluGroupNorm(nn.GroupNorm):
    """The weights of a GroupNorm that SiLU follows; `Norm` computes it, with `kernels`."""

    kernels: Kernels = reference


class Norm:
    """A GroupNorm and SiLU with the statistics of a whole map, for its windows one by one."""

    def __init__(self, norm: SiluGroupNorm, x: Map, memory: DecoderMemory) -> None:
        """Valid until the next `Norm`, which uses the same `memory`."""
        self._kernels, self._memory = norm.kernels, memory
        moments = x.moments
        if moments is None:
            moments = memory.moments()
            for strip in x.strips:
                norm.kernels.group_moments(strip, moments)
        self._scale, self._shift = terms = memory.terms(norm.num_channels)
        norm.kernels.norm_terms(moments, norm.weight, norm.bias, norm.eps, terms)

    def __call__(self, window: Window) -> Tensor:
        """The window with a border, for the next convolution: `[1, C, rows + 2, W + 2]`."""
        out = self._memory.bordered(*window.strip.shape[1:])
        self._kernels.norm_silu(window, self._scale, self._shift, out)
        return out


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution of strips with a border, computed with `kernels`."""

    kernels: Kernels = reference

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 3, padding=1)

    def strip(self, x: Tensor, out: Tensor, moments: Moments | None = None, *, add: bool = False) -> None:
        """Convolve `x`, which has a border, into `out`, or add to it."""
        assert self.bias is not None
        self.kernels.convolve(x, self.weight, self.bias, out, moments, add=add)

    def doubled(self, taps: Tensor, x: Tensor, out: Tensor, moments: Moments) -> None:
        """Double `x`, which has a border, in both directions and convolve it; `taps` from `kernels.corner_taps`."""
        assert self.bias is not None
        self.kernels.convolve_doubled(x, taps, self.bias, out, moments)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, and a skip connection around them."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.norm1 = SiluGroupNorm(groups, inside, eps=1e-6)
        self.conv1 = Convolution(inside, outside)
        self.norm2 = SiluGroupNorm(groups, outside, eps=1e-6)
        self.conv2 = Convolution(outside, outside)
        if inside != outside:
            self.nin_shortcut = Conv2d(inside, outside, 1)

    def forward(self, x: Map, between: Map, out: Map, memory: DecoderMemory) -> Map:
        """`inside` channels to `outside`, in `out`. That is `x` itself; where the width changes, it overwrites `x`."""
        changes = hasattr(self, "nin_shortcut")
        norm = Norm(self.norm1, x, memory)
        h = Map(between.strips, memory.moments())
        for window, skip, strip in zip(
            memory.windows(x.strips, overwritten=changes), out.strips, h.strips, strict=True
        ):
            normed = norm(window)
            if changes:
                self._shortcut(window.strip, skip)  # first: `strip` may overwrite this strip of `x`
            self.conv1.strip(normed, strip, h.moments)
        norm = Norm(self.norm2, h, memory)
        out = Map(out.strips, memory.moments())
        for window, strip in zip(memory.windows(h.strips), out.strips, strict=True):
            self.conv2.strip(norm(window), strip, out.moments, add=True)
        return out

    def _shortcut(self, x: Tensor, out: Tensor) -> None:
        """The 1 x 1 convolution, as a matrix product."""
        conv = self.nin_shortcut
        assert conv.bias is not None
        x, out = (rearrange(strip, "1 c h w -> (h w) c") for strip in (x, out))
        torch.addmm(conv.bias, x, conv.weight.flatten(1).t(), out=out)


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

    def forward(self, x: Tensor, memory: DecoderMemory) -> None:
        """In place on `x` `[1, C, h, w]`."""
        q, k, v, out = memory.matrices()
        tokens = rearrange(self.norm(x), "1 c h w -> (h w) c")
        for linear, product in ((self.q, q), (self.k, k), (self.v, v)):
            torch.addmm(linear.bias, tokens, linear.weight.t(), out=product)
        del tokens
        self.kernels.attend(q, k, v, out)
        torch.addmm(self.proj_out.bias, out, self.proj_out.weight.t(), out=q)
        x.add_(rearrange(q, "(h w) c -> 1 c h w", h=x.shape[2]))


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


class Mid(nn.Module):
    """The lowest level, with attention over the whole picture. It is small, so it is one strip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Map, between: Map, memory: DecoderMemory) -> None:
        """In place on `x`."""
        (strip,) = self.block_1(x, between, x, memory).strips
        self.attn_1(strip, memory)
        self.block_2(x, between, x, memory)


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


class Decoder(nn.Module):
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

    def use(self, kernels: Kernels) -> None:
        """Compute norms, convolutions and attention with `kernels`; the fused ones need `channels_last`."""
        for module in self.modules():
            if isinstance(module, SiluGroupNorm | Convolution | AttnBlock):
                module.kernels = kernels

    def channels_last(self) -> None:
        """Lay the convolutions' weights out with channels last, as all maps are. Call it after they are read."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

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
