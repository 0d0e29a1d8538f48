"""What both halves of the VAE are made of: norms, convolutions, residual blocks and attention, on maps in strips.

Layout and names are BFL's. It is not taken from diffusers, because coding within a VRAM budget works strip by strip
between places in one block of memory; see flux1/strip_memory.py.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, Linear

from ..kernels import Kernels, Moments, Window, reference
from .strip_memory import Map, StripMemory


class SiluGroupNorm(nn.GroupNorm):
    """The weights of a GroupNorm that SiLU follows; `Norm` computes it, with `kernels`."""

    kernels: Kernels = reference


class Norm:
    """A GroupNorm and SiLU with the statistics of a whole map, for its windows one by one."""

    def __init__(self, norm: SiluGroupNorm, x: Map, memory: StripMemory) -> None:
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

    def forward(self, x: Map, between: Map, out: Map, memory: StripMemory) -> Map:
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

    def forward(self, x: Tensor, memory: StripMemory) -> None:
        """In place on `x` `[1, C, h, w]`."""
        q, k, v, out = memory.matrices()
        tokens = rearrange(self.norm(x), "1 c h w -> (h w) c")
        for linear, product in ((self.q, q), (self.k, k), (self.v, v)):
            torch.addmm(linear.bias, tokens, linear.weight.t(), out=product)
        del tokens
        self.kernels.attend(q, k, v, out)
        torch.addmm(self.proj_out.bias, out, self.proj_out.weight.t(), out=q)
        x.add_(rearrange(q, "(h w) c -> 1 c h w", h=x.shape[2]))


class Mid(nn.Module):
    """The lowest level, with attention over the whole picture. It is small, so it is one strip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Map, between: Map, memory: StripMemory) -> None:
        """In place on `x`."""
        (strip,) = self.block_1(x, between, x, memory).strips
        self.attn_1(strip, memory)
        self.block_2(x, between, x, memory)


class StripModule(nn.Module):
    """A half of the VAE."""

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
