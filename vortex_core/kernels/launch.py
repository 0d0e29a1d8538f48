"""How kernels are launched: on the device of what they take, and while the one before still ends.

The latter is programmatic dependent launch, on Hopper. A step has some 800 kernels, and between two of them a card
idles for a microsecond or two. A kernel that is launched early is set up meanwhile, and waits inside. That pays in fp8
alone: in 16 bits there is less idling for the work, and a step at 1024 x 1024 took 0.8 % longer by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

import torch
import triton
import triton.language as tl
from torch import Tensor

from .capabilities import card
from .scaled_tensor import FP8

P = ParamSpec("P")


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait for all that was launched before, and let the next kernel be set up.

    Before it, a kernel writes nothing, and reads only what the launches before it did not write.
    """
    if EARLY:  # as in triton.language.extra.cuda, which does not compile in Triton 3.4
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


def early(operand: Tensor) -> dict[str, bool]:
    """Arguments of a launch for a kernel that calls `follow` and takes or makes `operand`: early if that is fp8."""
    pays = operand.dtype == FP8 and card(operand.device).early
    return {"EARLY": True, "launch_pdl": True} if pays else {"EARLY": False}


def on_device(function: Callable[P, None]) -> Callable[P, None]:
    """`function`, launched with the device of the first tensor that it takes, in a tuple or by itself, as the current.

    Triton launches on the current device, whatever it is given. Elsewhere than on CUDA nothing is switched.
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
