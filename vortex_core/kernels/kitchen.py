"""comfy-kitchen's CUDA kernels for a step, where the host has them: recent ComfyUI does, on Windows too.

Each function is taken if it gives what `reference` does on a sample, else `library`'s. Only comfy-kitchen's CUDA
backend is asked, never its Triton one, nor what it does in plain torch. It has no function that writes into given
memory, but for the rotary embedding, so a copy follows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..utils.packages import first_line, missing
from . import library, reference
from .reference import EPSILON
from .scaled_tensor import ScaledTensor

NEAR = 0.004  # the most that a sample may be off, relative: bf16 rounds by up to this
OPERATIONS = {"adaLN": ("modulate", "residual_modulate"), "RMS norm with rotary embedding": ("rotate",)}


def modulate(x: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.modulate`."""
    step = max(1, library.TOKENS // len(x))
    for part, place in zip(x.split(step, 1), out.values.split(step, 1), strict=True):
        place.copy_(_call("adaln", part, scale, shift, EPSILON))


def residual_modulate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None:
    """See `reference.residual_modulate`."""
    torch.addcmul(x, y, gate, out=x)
    modulate(x, shift, scale, out)


def rotate(qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `reference.rotate`."""
    step = max(1, library.TOKENS // len(qkv))
    for part, c, s in zip(qkv.split(step, 1), cos.split(step), sin.split(step), strict=True):
        turns = torch.stack((c, -s, s, c), -1).view(1, len(c), 1, -1, 2, 2)
        _call("rms_rope_", part[:, :, 0], part[:, :, 1], turns, query_norm, key_norm, EPSILON)


def _call(name: str, *arguments: Any) -> Any:
    import comfy_kitchen

    with comfy_kitchen.use_backend("cuda"):
        return getattr(comfy_kitchen, name)(*arguments)


def taken(device: torch.device) -> tuple[dict[str, Callable[..., None]], str]:
    """The functions here that work on `device`, by name, and in words why others do not."""
    why = missing("comfy_kitchen")
    if why is not None:
        return {}, f"comfy-kitchen {why}"
    found: dict[str, Callable[..., None]] = {}
    words = []
    for operation, names in OPERATIONS.items():
        declined = _declined(device, names)
        if declined is None:
            found |= {name: globals()[name] for name in names}
        words.append(f"{operation} " + ("taken" if declined is None else f"declined ({declined})"))
    return found, f"comfy-kitchen {_version()}: {', '.join(words)}"


def _declined(device: torch.device, names: tuple[str, ...]) -> str | None:
    """Why these functions fail on a sample on `device`, or None."""
    for name in names:
        try:
            ours = sample(globals()[name], name, device)
        except torch.OutOfMemoryError:  # says nothing about comfy-kitchen
            raise
        except Exception as error:  # of any kind: it is old, broken, or not built for this card
            return first_line(error)
        for found, expected in zip(ours, sample(getattr(reference, name), name, device), strict=True):
            off = (found.float() - expected.float()).norm() / expected.float().norm()
            if not off <= NEAR:  # NaN, too
                return f"off by {float(off):.2g} on a sample"
    return None


def sample(function: Callable[..., None], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a function of a step, of that name, writes for a sample: two tensors."""
    draw = torch.Generator(device).manual_seed(0)
    x, y = torch.randn(2, 1, 37, 6 * 128, generator=draw, device=device).bfloat16()
    rows = (torch.randn(3, 6 * 128, generator=draw, device=device) / 2).bfloat16()
    if name == "rotate":
        angle = torch.randn(37, 64, generator=draw, device=device)
        qkv = x.unflatten(2, (3, 2, 128))
        function(qkv, *rows[:2, :128], angle.cos(), angle.sin())
        return qkv, qkv
    out = ScaledTensor(torch.full_like(x, torch.nan))
    if name == "modulate":
        function(x, *rows[1:], out)
    else:
        function(x, y, *rows, out)
    return x, out.values


def _version() -> str:
    try:
        return metadata.version("comfy-kitchen")
    except metadata.PackageNotFoundError:
        return "of unknown version"
