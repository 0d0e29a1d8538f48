"""Inputs at odd sizes, outputs full of NaN, and how near a kernel comes to its reference.

Without a GPU kernels run in Triton's interpreter, as conftest.py says; the tests marked `gpu` run them compiled.
The interpreter cuts bf16 where hardware rounds and drops the carry when it rounds to fp8. So on the CPU fp16
stands for the one, and for the other fp32: what is checked there is everything but the rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vortex_core.kernels import Moments, ScaledTensor, reference
from vortex_core.kernels.scaled_tensor import FP8

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
TYPES = [torch.float32, HALF]
EIGHT = FP8 if GPU else torch.float32


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def part(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two equal `[B, T, W]` views into wider and longer buffers, as the step has them."""
    whole = draw(batch, tokens + 3, width + 64, dtype=dtype)
    return tuple(copy[:, 2 : 2 + tokens, 32 : 32 + width] for copy in (whole, whole.clone()))


def empty(batch: int, tokens: int, width: int, dtype: torch.dtype, *, scaled: bool = False) -> ScaledTensor:
    """An operand full of NaN."""
    scale = torch.full((batch, tokens), torch.nan, device=DEVICE) if scaled else None
    return ScaledTensor(torch.full((batch, tokens, width), torch.nan, device=DEVICE).to(dtype), scale)


def meant(operand: ScaledTensor) -> Tensor:
    values = operand.values.float()
    return values if operand.scale is None else values * operand.scale[..., None]


def assert_same(ours: ScaledTensor, expected: ScaledTensor) -> None:
    """Equal up to one rounding of the type."""
    step = torch.finfo(ours.values.dtype).eps if ours.values.dtype != torch.float32 else 1e-5
    assert torch.isfinite(meant(ours)).all()
    if ours.scale is not None:
        torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)
        floor = expected.scale.max() * 2**-9  # fp8's smallest step
    else:
        floor = 1e-5
    torch.testing.assert_close(meant(ours), meant(expected), rtol=step, atol=float(floor))
    # rounding may fall the other way here and there, but not often
    assert (ours.values.float() != expected.values.float()).float().mean() < (1 if step < 1e-4 else 0.02)


def picture(*shape: int, dtype: torch.dtype) -> Tensor:
    return draw(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def no_moments(groups: int, capacity: int) -> Moments:
    return Moments(torch.full((3, groups, capacity), torch.nan, device=DEVICE))


class ChannelsLast:
    """Kernels, for maps as the fused ones take them: these read memory, whatever the strides say."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def checked(*arguments: object, **options: object) -> None:
            for tensor in tree_leaves((arguments, options)):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                    assert tensor.is_contiguous(memory_format=torch.channels_last), name
                    assert not tensor.data_ptr() % 16, name
            getattr(reference, name)(*arguments, **options)

        return checked
