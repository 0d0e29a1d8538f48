"""From a seed to noise, from noise to clean latents: packing, positions, the schedule and the Euler steps.

Legend: B pictures, H and W in pixels, S = H/16 * W/16 packed tokens, N text tokens, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
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


def timesteps(steps: int) -> tuple[float, ...]:
    """schnell's schedule, `steps + 1` values from 1 to 0, evenly spaced (shift 1)."""
    return tuple(1 - i / steps for i in range(steps + 1))


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


def denoise(
    transformer: Callable[[Tensor, Tensor, Tensor, Rope], Tensor],
    img: Tensor,
    txt: Tensor,
    modulation: Tensor,
    pe: Rope,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    at_once: int | None = None,
    clean: Tensor | None = None,
) -> Tensor:
    """The Euler steps from noise to clean latents, in place on `img` (fp32 `[B, S, 64]`), which is returned.

    `txt [1, N, D]`: the embeddings after `txt_in`. `modulation`: `[steps, rows, D]`. `on_step(i, n, clean)` is called
    after step i of n (from 1) with the packed clean latents that the step predicts; it may raise to cancel. `clean`:
    memory for these. The transformer gets `at_once` pictures at a time; None: all.
    """
    steps = modulation.shape[0]
    clean = torch.empty_like(img) if clean is None else clean
    at_once = at_once or len(img)
    for i, (t, t_next) in enumerate(pairwise(timesteps(steps))):
        check()
        for part, predicted in zip(img.split(at_once), clean.split(at_once), strict=True):
            velocity = transformer(part, txt.expand(len(part), -1, -1), modulation[i], pe).float()
            if on_step is not None:
                torch.sub(part, torch.mul(velocity, t, out=predicted), out=predicted)
            part.add_(velocity, alpha=t_next - t)
        if on_step is not None:
            on_step(i + 1, steps, clean)
        mark(f"step {i + 1}")
    return img
