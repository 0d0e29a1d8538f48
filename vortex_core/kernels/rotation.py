"""The rotation of 8-bit integer operands: each block of K is multiplied by one orthogonal matrix.

It spreads a large value over its block, so that a scale wastes less of the 8 bits; and it cancels in a product, as
both operands are rotated: x W^T = (x R)(W R)^T. A block is 128 wide, or 64 where K is not a multiple of 128, and
R = diag(s) H / sqrt(width), with H the Sylvester-Hadamard matrix. The signs s are a bent function of an index's six low
bits, whose own transform is flat: what all values have in common, such as the mean of what follows GELU, is spread
evenly too, and does not gather in one value.

H of 128 is H of 64 applied to both halves, and then their sums and differences. So one table of 64 x 64 serves both
widths. Kernels multiply by its +-1, exact in every type, and fold 1 / sqrt(width) into the scales.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

HALF = 64  # what the table rotates; NF4's block too
INT8_MAX = 127.0


def block(k: int) -> int:
    """The width of a block in rows of `k` values, which is a multiple of 64."""
    return 2 * HALF if k % (2 * HALF) == 0 else HALF


def unit(k: int) -> float:
    """What a row's largest sum is multiplied by to get the row's scale."""
    return block(k) ** -0.5 / INT8_MAX


@cache
def table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[64, 64]` of +-1: diag(s) H, which multiplies rows from the right."""
    index = torch.arange(HALF)
    bits = (index[:, None] >> torch.arange(6)) & 1
    bent = (bits[:, 0::2] * bits[:, 1::2]).sum(1)
    hadamard = (bits[:, None] * bits[None, :]).sum(2)
    return (1 - 2 * ((bent[:, None] + hadamard) % 2)).to(device, dtype)


def rotated(x: Tensor) -> Tensor:
    """fp32 `[..., K]` times R."""
    return sums(x) * block(x.shape[-1]) ** -0.5


@cache
def shuffled_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`table` with columns in the order in which fused kernels have results in registers: see `rotated.in_order`."""
    columns = torch.arange(HALF).view(4, 8, 2).transpose(0, 1).flatten()
    return table(device, dtype)[:, columns.to(device)].contiguous()


def sums(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """fp32 `[..., K]` times R and the root of its width; `scale` `[..., K/64]` is applied to the halves.

    The order of operations is that of the fused kernels.
    """
    k = x.shape[-1]
    halves = x.unflatten(-1, (-1, HALF)) @ table(x.device, torch.float32)
    if scale is not None:
        halves = halves * scale[..., None]
    if block(k) == HALF:
        return halves.flatten(-2)
    first, second = halves.unflatten(-2, (-1, 2)).unbind(-2)
    return torch.stack((first + second, first - second), dim=-2).flatten(-3)
