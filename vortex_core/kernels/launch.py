"""How kernels are launched: on the device of their tensors, and on Hopper before the kernel before has ended.

That is programmatic dependent launch. A step has some 800 kernels, and between two of them a card idles for a
microsecond or two. A kernel that is launched early is set up meanwhile, and waits inside. It pays in 8 bits only: in 16
bits idling is a smaller share, and a step at 1024 x 1024 took 0.8 % longer. It was measured with fp8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import card
from .on_device import on_device
from .scaled_tensor import FP8

__all__ = ["early", "follow", "on_device"]


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
