"""The VAE encoder: pictures to latents in the model's scale. Layout and names are BFL's.

Legend: B pictures, H and W in pixels; latents are [B, 16, H/8, W/8]; a `Map` is a feature map in strips. Latents are
the mode of what the encoder gives: half of its channels. The others, a variance, are not computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Conv2d

from ..kernels import Kernels, Window
from ..utils.timing import mark
from .encoder_memory import COLOURS, EncoderLayout, EncoderMemory
from .spec import VaeSpec
from .strip_memory import Map
from .vae_blocks import Convolution, Mid, Norm, ResnetBlock, SiluGroupNorm, StripModule

AT_ONCE = 2**21  # values of a map that torch's convolutions take at once, so that their allocations have a bound


class Downsample(nn.Module):
    """A convolution of every second pixel, with a border of zeros below and to the right alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Map, out: Tensor, memory: EncoderMemory) -> None:
        """Half the height and width, in `out` `[1, C, h / 2, w / 2]`."""
        top = 0
        for window in memory.windows(x.strips):
            rows = window.strip.shape[2] // 2
            _convolve(self.conv, _cornered(window, memory), out[:, :, top : top + rows])
            top += rows


class DownLevel(nn.Module):
    """One resolution: its residual blocks, then downsampling, except at the last level."""

    def __init__(self, inside: int, outside: int, spec: VaeSpec, *, last: bool) -> None:
        super().__init__()
        widths = [inside] + [outside] * (spec.layers - 1)
        self.block = nn.ModuleList(ResnetBlock(width, outside, spec.groups) for width in widths)
        if not last:
            self.downsample = Downsample(outside)

    def forward(self, k: int, memory: EncoderMemory) -> None:
        """Run level `k` on its arrival, and downsample for the next level, if there is one."""
        x, out, between = memory.arrival(k), memory.residual(k), memory.other(k)
        for block in self.block:
            x = block(x, between, out, memory)
        if hasattr(self, "downsample"):
            self.downsample(x, memory.entry(k + 1), memory)


class Encoder(StripModule):
    """FLUX's VAE encoder. Levels are numbered as in the checkpoint: `down.0` is the highest resolution, and runs first.

    `conv_out` has the checkpoint's channels, a mean and a variance for each of the latents'.
    """

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        first, *_, lowest = spec.channels
        self.conv_in = Conv2d(COLOURS, first, 3)
        arriving = (first, *spec.channels[:-1])
        self.down = nn.ModuleList(
            DownLevel(inside, outside, spec, last=k == len(arriving) - 1)
            for k, (inside, outside) in enumerate(zip(arriving, spec.channels, strict=True))
        )
        self.mid = Mid(lowest, spec.groups)
        self.norm_out = SiluGroupNorm(spec.groups, lowest, eps=1e-6)
        self.conv_out = Convolution(lowest, 2 * spec.latent_channels)

    def forward(self, memory: EncoderMemory) -> None:
        """Encode `memory.picture`, -1..1 with a border of zeros, to `memory.latent`, not yet in the model's scale."""
        _convolve(self.conv_in, memory.picture, memory.entry(0))
        for k, level in enumerate(self.down):
            level(k, memory)
        lowest, between = memory.lowest()
        self.mid(lowest, between, memory)
        norm = Norm(self.norm_out, lowest, memory)
        (window,) = memory.windows(lowest.strips)
        mean = slice(self.spec.latent_channels)
        weight, bias = self.conv_out.weight[mean], self.conv_out.bias
        assert bias is not None
        self.conv_out.kernels.convolve(norm(window), weight, bias[mean], memory.latent)


def encode(
    encoder: Encoder, pictures: Tensor, out: Tensor, rows: int | None = None, memory: Tensor | None = None
) -> Tensor:
    """Write latents in the model's scale into `out`, float32 `[B, 16, H/8, W/8]`, and return it.

    `pictures`: `[B, H, W, 3]` in 0..1. `rows`: of a strip, at most; None: one strip. `memory`: uint8, one dimension, at
    least `EncoderLayout.nbytes`, on the encoder's device; None: allocated for the call. Raises `ValueError` where it is
    too small. Pictures are encoded one by one, as they are decoded.
    """
    weight = encoder.norm_out.weight
    layout = EncoderLayout(encoder.spec, out.shape[2], out.shape[3], rows, weight.dtype)
    if memory is None:
        memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=weight.device)
    places = EncoderMemory(layout, memory)
    inner = places.picture[:, :, 1:-1, 1:-1]
    for picture, latent in zip(pictures, out, strict=True):
        # doubled last: a double is exact, so that a value is rounded once
        inner.copy_(rearrange(picture - 0.5, "h w c -> 1 c h w")).mul_(2)
        encoder(places)
        latent.copy_(places.latent[0]).sub_(encoder.spec.shift).mul_(encoder.spec.scale)
    mark("encode")
    return out


def encoder_library_bytes(spec: VaeSpec, height: int, width: int, dtype: torch.dtype, kernels: Kernels | None) -> int:
    """The most bytes that torch's operations allocate while a picture is encoded, besides its `memory`.

    `height`, `width`: those of the latents. The convolutions from level to level are torch's: they take their result
    and a copy of their input, some rows at a time. The mid block is the decoder's.
    """
    layout, itemsize = EncoderLayout(spec, height, width, None, dtype), dtype.itemsize
    lowest = layout.levels[-1]
    lowest_map = height * width * lowest.channels * itemsize
    sizes = [
        4 * 64 * height * width * COLOURS,
        2 * lowest_map + lowest_map // 16,
    ]  # the picture, fp32; attention's norm
    for level in layout.levels:
        rows = min(level.height, _rows(level.width * level.channels))
        sizes.append(rows * level.width * level.channels * itemsize)
        if kernels is not None:
            inside = {level.arriving, level.channels}
            sizes += [kernels.strip_bytes(one, level.channels, level.width, itemsize) for one in inside]
    for level in layout.levels[:-1]:
        rows = min(level.height // 2, _rows(level.width // 2 * level.channels))
        values = rows * (level.width // 2) + (2 * rows + 1) * (level.width + 1)
        sizes.append(values * level.channels * itemsize)
    if kernels is not None:
        sizes.append(kernels.attention_bytes(height * width, lowest.channels, itemsize))
    return max(sizes) + 2**20  # statistics and other small things


def _cornered(window: Window, memory: EncoderMemory) -> Tensor:
    """A window with the row below and a column to the right, zeros beyond the picture: `[1, C, h + 1, w + 1]`."""
    _, channels, rows, width = window.strip.shape
    out = memory.cornered(channels, rows, width)
    out[..., width:].zero_()
    out[:, :, :rows, :width].copy_(window.strip)
    last = out[:, :, rows:, :width]
    last.zero_() if window.below is None else last.copy_(window.below)
    return out


def _convolve(conv: Conv2d, x: Tensor, out: Tensor) -> None:
    """The convolution of `x`, which has its border, to `out`, some rows at a time."""
    stride = conv.stride[0]
    step = _rows(out.shape[1] * out.shape[3])
    for top in range(0, out.shape[2], step):
        place = out[:, :, top : top + step]
        rows = x[:, :, stride * top :][:, :, : stride * (place.shape[2] - 1) + 3]
        place.copy_(F.conv2d(rows, conv.weight, conv.bias, stride))


def _rows(values: int) -> int:
    """Rows of `values` each that torch's convolutions take at once."""
    return max(1, AT_ONCE // values)
