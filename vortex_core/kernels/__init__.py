"""Functions on raw tensors: what a step computes besides matrix products, and what the VAE's decoder computes.

Several modules have the same functions. `reference`, in plain torch, runs anywhere and is the oracle; it also describes
shapes and meaning. A card gets the first of these that works there: `fused` in Triton; `compiled` in CUDA C; `library`,
torch's own functions, with those of comfy-kitchen in their place where they agree (`kitchen`). They write into given
memory, and allocate no more than their functions ending in `_bytes` tell.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Protocol, cast

import torch
from torch import Tensor

from ..utils.packages import first_line, missing
from . import kitchen, library, reference
from .adapter import ADD_BYTES, Adapter
from .scaled_tensor import TILE, Heads, Moments, ScaledTensor, Window, empty_heads, most_parts

__all__ = [
    "ADD_BYTES",
    "Adapter",
    "Heads",
    "Kernels",
    "Moments",
    "ScaledTensor",
    "Window",
    "attends_in_fp8",
    "choose_kernels",
    "compiled_declined",
    "fused_declined",
    "most_parts",
    "reference",
    "weights_declined",
]

log = logging.getLogger(__name__)


class Kernels(Protocol):
    """The functions that `reference` and `fused` share. `reference` describes them."""

    def dequantize(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None = None) -> None: ...
    def row_scales(self, packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype) -> None: ...
    def multiply_int8(
        self, x: Tensor, x_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, out: Tensor
    ) -> None: ...
    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor) -> None: ...
    def residual_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, out: ScaledTensor
    ) -> None: ...
    def gelu(self, x: Tensor, out: ScaledTensor, before: Tensor | None = None) -> None: ...
    def quantize(self, x: Tensor, out: ScaledTensor) -> None: ...
    def rotate(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor) -> None: ...
    def guide(self, wanted: Tensor, avoided: Tensor, terms: Tensor, out: Tensor) -> None: ...
    def pack_heads(
        self, qkv: Tensor, norms: Sequence[Tensor], boundary: int, cos: Tensor, sin: Tensor, heads: Heads
    ) -> None: ...
    def attend_heads(self, heads: Heads, out: Tensor) -> None: ...
    def group_moments(self, x: Tensor, moments: Moments) -> None: ...
    def norm_terms(self, moments: Moments, weight: Tensor, bias: Tensor, epsilon: float, out: Tensor) -> None: ...
    def norm_silu(self, window: Window, scale: Tensor, shift: Tensor, out: Tensor) -> None: ...
    def bordered(self, window: Window, out: Tensor) -> None: ...
    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None, *, add: bool = False
    ) -> None: ...
    def corner_taps(self, weight: Tensor, out: Tensor) -> None: ...
    def convolve_doubled(
        self, x: Tensor, taps: Tensor, bias: Tensor, out: Tensor, moments: Moments | None = None
    ) -> None: ...
    def attend(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None: ...
    def step_bytes(self, hidden: int) -> int: ...
    def strip_bytes(self, inside: int, outside: int, width: int, itemsize: int, *, doubled: bool = False) -> int: ...
    def attention_bytes(self, tokens: int, channels: int, itemsize: int) -> int: ...


def fused_declined(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"they need CUDA, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need compute capability 8.0"
    why = missing("triton")
    return _broken(device) if why is None else f"Triton {why}"


@cache
def _broken(device: torch.device) -> str | None:
    """Why the kernels fail on samples, or None: Triton also needs a C compiler and a driver that it knows."""
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    absmax = torch.linspace(0.5, 2, 8, device=device).view(4, 2)
    dequantized, expected = torch.full((2, 4, 128), torch.nan, device=device)  # not what an earlier call left there
    try:
        from . import fused

        fused.dequantize(
            packed, absmax, dequantized
        )  # first: its table stays, and would split the larger samples' memory
        draw = torch.Generator(device).manual_seed(0)
        x, weight = (
            torch.randn(shape, generator=draw, device=device).bfloat16().to(memory_format=torch.channels_last)
            for shape in ((1, 128, 18, 18), (128, 128, 3, 3))
        )
        found = _samples(fused, x, weight)
    except torch.OutOfMemoryError:  # says nothing about the kernels, and must not be cached
        raise
    except Exception as error:  # of any kind: these kernels do not work here
        return f"Triton does not run ({first_line(error)})"
    reference.dequantize(packed, absmax, expected)
    wanted = _samples(reference, x, weight)
    near = all((a.float() - b.float()).norm() < 0.02 * b.float().norm() for a, b in zip(found, wanted, strict=True))
    return None if torch.equal(dequantized, expected) and near else "a sample differs from the reference"


def _samples(kernels: Kernels, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution of `x`, and the attention of its pixels to each other."""
    tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
    inside = x[:, :, 1:-1, 1:-1]
    convolved = torch.full_like(inside, torch.nan, memory_format=torch.channels_last)
    attended = torch.full_like(tokens, torch.nan)
    kernels.convolve(x, weight, tokens[0], convolved)
    kernels.attend(tokens, tokens, tokens, attended)
    return convolved, attended


def attends_in_fp8(device: torch.device) -> bool:
    """Whether attention in fp8, which needs Triton, works on `device` and is faster there. Logs why not."""
    major, minor = torch.cuda.get_device_capability(device)
    other = f"it was measured on compute capability 9.0 alone, and this card has {major}.{minor}"
    declined = fused_declined(device) or _heads_broken(device) if (major, minor) == (9, 0) else other
    if declined is not None:
        log.info("Attention: the library's; fp8 declined: %s", declined)
    return declined is None


@cache
def _heads_broken(device: torch.device) -> str | None:
    """Why attention in fp8 fails on a sample on `device`, or None.

    Each query is its own key, so each token must get its own value, up to a thousandth and fp8's rounding. There is no
    reference in torch, since libraries that are loaded for it would stay in host memory.
    """
    tokens, count, channels = TILE + 3, 2, 128
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, tokens, 3, count, channels, generator=draw, device=device).bfloat16()
    x[:, :, 1] = x[:, :, 0]
    norms, still = [torch.ones_like(x[0, 0, 0, 0])] * 4, torch.zeros(tokens, channels // 2, device=device)
    heads = empty_heads(x)
    try:
        from . import fused

        fused.pack_heads(x, norms, 0, still + 1, still, heads)
        fused.attend_heads(heads, x[:, :, 0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"Triton does not run attention in fp8 ({first_line(error)})"
    found, value = x[:, :, 0].float(), x[:, :, 2].float()
    off = float((found - value).norm() / value.norm())
    return None if off < 0.1 else "attention in fp8 is wrong on a sample"


def compiled_declined(device: torch.device) -> str | None:
    """Why the kernels in CUDA C cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"they need CUDA, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need compute capability 8.0"
    return _compiled_broken(device)


@cache
def _compiled_broken(device: torch.device) -> str | None:
    """Why the kernels in CUDA C fail on samples, or None: builds of torch may lack NVRTC."""
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    absmax = torch.linspace(0.5, 2, 8, device=device).view(4, 2)
    decoded = torch.full((2, 4, 128), torch.nan, device=device, dtype=torch.bfloat16)
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, 128, 18, 18, generator=draw, device=device).bfloat16().to(memory_format=torch.channels_last)
    samples = []
    try:
        from . import compiled

        for kernels, out in zip((compiled, reference), decoded, strict=True):
            kernels.dequantize(packed, absmax, out)
            steps = (kitchen.sample(getattr(kernels, name), name, device) for name in ("residual_modulate", "rotate"))
            samples.append([tensor for step in steps for tensor in step] + [_normal(kernels, x)])
    except torch.OutOfMemoryError:  # says nothing about the kernels, and must not be cached
        raise
    except Exception as error:  # of any kind: these kernels do not work here
        return f"NVRTC does not run ({first_line(error)})"
    near = all((a.float() - b.float()).norm() < 0.01 * b.float().norm() for a, b in zip(*samples, strict=True))
    return None if torch.equal(*decoded) and near else "a sample differs from the reference"


def _normal(kernels: Kernels, x: Tensor) -> Tensor:
    """The group norm and SiLU of a map, with a border."""
    moments = Moments(torch.empty(3, 32, 100, device=x.device))
    kernels.group_moments(x, moments)
    terms = torch.full((2, 128), torch.nan, device=x.device)
    kernels.norm_terms(moments, x[0, :, 0, 0].contiguous(), x[0, :, 0, 1].contiguous(), reference.EPSILON, terms)
    out = x.new_full((1, 20, 20, 128), torch.nan).permute(0, 3, 1, 2)
    kernels.norm_silu(Window(None, x, None), terms[0], terms[1], out)
    return out


@cache
def weights_declined(device: torch.device) -> str | None:
    """Why the kernels of `weights`, which LoRAs need with Triton, too, cannot run on a CUDA device, or None."""
    from . import nvrtc

    try:
        nvrtc.load()
    except OSError as error:
        return f"NVRTC does not load ({first_line(error)})"
    return None


def choose_kernels(device: torch.device) -> Kernels:
    """The fastest kernels that run on `device`. Logs which, and why faster ones were declined."""
    declined = fused_declined(device)
    if declined is None:
        from . import fused

        log.info("Kernels: Triton. The first picture on a machine compiles them, which takes up to half a minute.")
        return fused
    if device.type != "cuda":
        log.info("Kernels: plain torch; fused ones declined on %s: %s", device, declined)
        return reference
    reasons = f"Triton's declined on {device}: {declined}"
    declined = compiled_declined(device)
    if declined is None:
        from . import compiled

        log.info("Kernels: CUDA C, compiled by NVRTC; %s", reasons)
        return compiled
    functions, words = kitchen.taken(device)
    log.warning("Kernels: torch's own functions; %s; those in CUDA C: %s; %s", reasons, declined, words)
    return cast(Kernels, SimpleNamespace(**{name: getattr(library, name) for name in library.__all__} | functions))
