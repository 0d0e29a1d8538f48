"""The decoder's kernels where only what `fused` returns counts: nothing is computed, for footprints on `meta`."""

from __future__ import annotations

import torch
from torch import Tensor

from .operand import Window, empty_map

TILE = 128  # pixels of which a convolution finds the moments; fewer in small maps, where it does not matter


def group_moments(x: Tensor, groups: int, tiles: int = 1) -> Tensor:
    """See `reference.group_moments`; of so many `tiles`."""
    return x.new_empty(3, groups, tiles, dtype=torch.float32)


def norm_terms(moments: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `reference.norm_terms`."""
    scale, shift = moments.new_empty(2, len(weight)).unbind()
    return scale, shift


def norm_silu(window: Window, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.norm_silu`."""
    return bordered(window)


def bordered(window: Window) -> Tensor:
    """See `reference.bordered`."""
    _, channels, height, width = window.strip.shape
    return empty_map(window.strip, channels, height + 2, width + 2)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor | None = None, groups: int = 0
) -> tuple[Tensor, Tensor | None]:
    """See `reference.convolve`."""
    _, _, height, width = x.shape
    out = empty_map(x, len(bias), height - 2, width - 2) if onto is None else onto
    return out, group_moments(out, groups, -(-(height - 2) * width // TILE)) if groups else None


def corner_taps(weight: Tensor) -> Tensor:
    """See `reference.corner_taps`."""
    return weight.new_empty(16, *weight.shape[:2])


def convolve_doubled(x: Tensor, taps: Tensor, bias: Tensor, groups: int = 0) -> tuple[Tensor, Tensor | None]:
    """See `reference.convolve_doubled`."""
    _, _, height, width = x.shape
    out = empty_map(x, len(bias), 2 * height - 4, 2 * width - 4)
    return out, group_moments(out, groups, 4 * -(-(height - 2) * width // TILE)) if groups else None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See `reference.attend`."""
    return torch.empty_like(q)
