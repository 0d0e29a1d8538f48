"""From a seed to noise, from noise to clean latents: packing, positions, the schedule and the Euler steps.

Legend: B pictures, H and W in pixels, S = H/16 * W/16 packed tokens, N text tokens, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from ..device.jobs import check
from ..device.select import host_buffer
from ..utils.timing import mark
from .spec import FluxSpec
from .step_buffers import Rope

CPU = torch.device("cpu")


def noise(seed: int, batch: int, height: int, width: int, channels: int = 16, device: torch.device = CPU) -> Tensor:
    """fp32 noise `[B, C, H/8, W/8]` in host memory that `device` reads; picture i has a generator of seed `seed + i`.

    Drawn on the CPU, so that a seed means the same picture on every device, and the same noise as in ComfyUI's
    KSampler. Each picture has its own generator, so that a batch equals single pictures. Drawn in place: torch would
    spread a copy over all cores, and waking those takes longer than drawing.
    """
    pictures = host_buffer((batch, channels, height // 8, width // 8), torch.float32, device)
    for i, picture in enumerate(pictures):
        picture.normal_(generator=torch.Generator().manual_seed(seed + i))
    return pictures


def image_tokens(height: int, width: int) -> int:
    """How many tokens a picture has: one for each 16 x 16 pixels."""
    return height // 16 * (width // 16)


def patches(latents: Tensor) -> Tensor:
    """`[B, 16, H/8, W/8]` as `[B, H/16, W/16, 16, 2, 2]`, a view: the values of each token."""
    return rearrange(latents, "b c (h ph) (w pw) -> b h w c ph pw", ph=2, pw=2)


def as_patches(img: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, S, 64]` as `patches`, a view."""
    return rearrange(img, "b (h w) (c ph pw) -> b h w c ph pw", h=height // 16, w=width // 16, ph=2, pw=2)


def pack(latents: Tensor) -> Tensor:
    """`[B, 16, H/8, W/8]` to tokens `[B, S, 64]`."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """Tokens `[B, S, 64]` to `[B, 16, H/8, W/8]`, a copy."""
    return rearrange(img, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 16, w=width // 16, ph=2, pw=2)


def positions(height: int, width: int, tokens: int) -> Tensor:
    """Ids `[N + S, 3]`: zeros for text, `(0, row, column)` for each image token."""
    rows, columns = height // 16, width // 16
    img_ids = torch.zeros(rows, columns, 3)
    img_ids[..., 1] = torch.arange(rows)[:, None]
    img_ids[..., 2] = torch.arange(columns)[None, :]
    return torch.cat((torch.zeros(tokens, 3), img_ids.flatten(0, 1)))


def rope(ids: Tensor, spec: FluxSpec, device: torch.device) -> Rope:
    """cos and sin of the rotary embedding, fp32 `[N + S, C/2]`, computed in fp64 on the CPU as BFL does."""
    angles = []
    for axis, dim in enumerate(spec.axes):
        frequencies = spec.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(ids[:, axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


@lru_cache(maxsize=8)
def rope_of(height: int, width: int, tokens: int, spec: FluxSpec, device: torch.device = CPU) -> Rope:
    """The rotary tables of a size, in host memory that `device` reads; 8 sizes are kept, up to 4 MB each (8 pinned)."""
    cos, sin = (
        host_buffer(table.shape, table.dtype, device).copy_(table)
        for table in rope(positions(height, width, tokens), spec, CPU)
    )
    return cos, sin


@dataclass(frozen=True, slots=True)
class Kept:
    """What inpainting keeps: the `clean` latents of the picture given, and their `noise`, where `mask` is 0.

    All packed, fp32 `[B, S, 64]`; the mask is 0 or 1, or between them where both are mixed.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor

    def restore(self, img: Tensor, sigma: float) -> None:
        """Put into `img` what is kept, with the noise of level `sigma`."""
        known = torch.lerp(self.clean, self.noise, sigma)
        img.copy_(torch.lerp(known, img, self.mask))


def denoise(
    velocity: Callable[[Tensor, int, float], Tensor],
    img: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int, int, Tensor], None] | None = None,
    parts: Sequence[int] | None = None,
    clean: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """The Euler steps from noise to clean latents, in place on `img` (`[B, S, 64]`, fp32), which is returned.

    `sigmas`: a level of noise for each step, then 0. `velocity(x, first, sigma)`: that of the pictures from `first` on,
    `x`. It gets as many at a time as `parts` says; None: all. `on_step(i, n, clean)` is called after step i of n (from
    1) with the packed clean latents that the step predicts; it may raise to cancel. `clean`: memory for these.
    """
    steps = len(sigmas) - 1
    clean = torch.empty_like(img) if clean is None else clean
    parts = [len(img)] if parts is None else list(parts)
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        check()
        first = 0
        for part, predicted in zip(img.split(parts), clean.split(parts), strict=True):
            found = velocity(part, first, t).float()
            if on_step is not None:
                torch.sub(part, torch.mul(found, t, out=predicted), out=predicted)
            part.add_(found, alpha=t_next - t)
            first += len(part)
        if kept is not None:
            kept.restore(img, t_next)
        if on_step is not None:
            if kept is not None:
                kept.restore(clean, 0)
            on_step(i + 1, steps, clean)
        mark(f"step {i + 1}")
    return img
