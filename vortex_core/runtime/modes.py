"""Which mode a model runs in: `fast` where the card, torch and the weights can, else `exact`, and the log says why."""

from __future__ import annotations

import logging
from functools import cache

import torch

from ..kernels import fused_declined
from ..kernels.scaled_tensor import FP8
from ..quant.backends import Backend
from ..quant.linear import product
from ..utils.packages import first_line

log = logging.getLogger(__name__)


def choose_mode(mode: str, device: torch.device, dtype: torch.dtype, backend: Backend | None) -> str:
    """`mode`, or `exact` where `fast` cannot run; then the log says why."""
    if mode == "exact":
        return mode
    if backend is None:
        declined: str | None = "it multiplies NF4 weights, and these are not"
    elif backend.name != "triton":
        declined = fused_declined(device) or f"only the triton backend decodes to fp8, and it is {backend.name}"
    elif dtype != torch.bfloat16:
        declined = f"products in fp8 end in bf16, and {dtype} was asked for"
    else:
        declined = fp8_declined(device)  # last, since it compiles kernels
    if declined is None:
        return mode
    log.log(logging.WARNING if device.type == "cuda" else logging.INFO, "Mode: exact; fast declined: %s", declined)
    return "exact"


def fp8_declined(device: torch.device) -> str | None:
    """Why `fast` products cannot run on `device`, or None."""
    declined = fused_declined(device)
    if declined is None and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        return f"fp8 needs compute capability 8.9, and this card has {major}.{minor}"
    return declined or _fp8_broken(device)


@cache
def _fp8_broken(device: torch.device) -> str | None:
    """Why this torch cannot multiply a sample in fp8 with a scale a row, or None."""
    x, weight = (torch.ones(rows, 64, device=device).to(FP8) for rows in (16, 32))
    scales = [torch.ones(rows, device=device) for rows in (16, 32)]
    out = torch.empty(16, 32, dtype=torch.bfloat16, device=device)
    try:
        product(x, scales[0], weight, scales[1], torch.zeros_like(out[0]), out)
    except torch.OutOfMemoryError:  # says nothing about this torch, and must not be cached
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} does not: {first_line(error)}"
    return None if bool((out == 64).all()) else "a sample product is wrong"
