"""What a step computes besides matrix products, as functions on raw tensors that write into buffers they are given.

Two modules have the same functions: `reference` in plain torch, which runs anywhere and is the oracle, and `fused`
in Triton. Neither allocates what it returns; `fused` allocates nothing. Shapes and meaning are told in `reference`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .operand import Operand

__all__ = ["Kernels", "Operand", "choose_kernels", "fused_declined", "reference"]

log = logging.getLogger(__name__)


class Kernels(Protocol):
    """The functions that `reference` and `fused` share."""

    def decode(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None = None) -> None:
        """NF4 to `out`."""
        ...

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, out: Operand) -> None:
        """adaLN of `x`."""
        ...

    def residual_modulate(self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: Operand) -> None:
        """`x += gate * y` in place, and adaLN of it."""
        ...

    def gelu(self, x: Tensor, out: Operand, before: Tensor | None = None) -> None:
        """Per-token fp8 of `before` and the GELU of `x`, side by side."""
        ...

    def quantize(self, x: Tensor, out: Operand) -> None:
        """Per-token fp8 of `x`."""
        ...

    def rotate(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
        """RMS norm and rotary embedding of q and k, in place."""
        ...

    def group_moments(self, x: Tensor, groups: int) -> Tensor:
        """What group norm needs to know of a strip."""
        ...

    def norm_silu(self, x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        """SiLU of a scaled and shifted picture."""
        ...


def fused_declined(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"they need CUDA, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need compute capability 8.0"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error})"
    return _broken(device)


@cache
def _broken(device: torch.device) -> str | None:
    """Why a sample is not decoded like the reference: Triton also needs a C compiler and a driver it knows."""
    from . import fused

    packed = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    absmax = torch.linspace(0.5, 2, 8, device=device).view(4, 2)
    ours, expected = torch.empty(2, 4, 128, device=device)
    try:
        fused.decode(packed, absmax, ours)
    except Exception as error:  # of many kinds, and each only means: not these kernels
        return f"Triton does not run ({str(error).partition(chr(10))[0]})"
    reference.decode(packed, absmax, expected)
    return None if torch.equal(ours, expected) else "a sample is decoded otherwise than by the reference"


def choose_kernels(device: torch.device) -> Kernels:
    """The fastest kernels that run on `device`. Logs why the fused ones were declined."""
    declined = fused_declined(device)
    if declined is None:
        from . import fused

        return fused
    log.log(
        logging.WARNING if device.type == "cuda" else logging.INFO,
        "Kernels: plain torch; fused ones declined on %s: %s",
        device,
        declined,
    )
    return reference
