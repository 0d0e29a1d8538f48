"""How kernels are launched: on the device of their tensors, and on Hopper before the kernel before has ended.

That is programmatic dependent launch. A step has some 800 kernels, and between two of them a card idles for a
microsecond or two. A kernel that is launched early is set up meanwhile, and waits inside. It pays in fp8 only: in 16
bits idling is a smaller share, and a step at 1024 x 1024 took 0.8 % longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import card
from .scaled_tensor import FP8

P = ParamSpec("P")


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait for all kernels that were launched before, and let the next one be set up.

    Before this call, a kernel writes nothing, and reads nothing that earlier launches write.
    """
    if EARLY:  # as in triton.language.extra.cuda, which does not compile in Triton 3.4
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


def early(operand: Tensor) -> dict[str, bool]:
    """Arguments of a kernel that calls `follow`: early where that pays, if `operand` (read or written) has 8 bits."""
    pays = operand.dtype in (FP8, torch.int8) and card(operand.device).early
    return {"EARLY": True, "launch_pdl": True} if pays else {"EARLY": False}


def on_device(function: Callable[P, None]) -> Callable[P, None]:
    """`function`, called with the device of its first tensor argument (maybe inside a tuple) as the current one.

    Triton launches on the current device, wherever the tensors are. Only CUDA devices are switched.
    """

    @wraps(function)
    def launched(*args: P.args, **kwargs: P.kwargs) -> None:
        first = _first_tensor((*args, *kwargs.values()))
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            function(*args, **kwargs)
            return
        with torch.cuda.device(first.device):
            function(*args, **kwargs)

    return launched


def _first_tensor(values: Iterable[object]) -> Tensor | None:
    for value in values:
        found = _first_tensor(value) if isinstance(value, tuple) else value
        if isinstance(found, Tensor):
            return found
    return None
