"""Launching a kernel while the one before it still ends (programmatic dependent launch, on Hopper).

A step has some 800 kernels, and between two of them a card idles for a microsecond or two. A kernel that is launched
early is set up meanwhile, and waits inside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import card


@triton.jit
def follow(EARLY: tl.constexpr):
    """Wait for all that was launched before, and let the next kernel be set up.

    Before it, a kernel writes nothing, and reads only what the launches before it did not write.
    """
    if EARLY:  # as in triton.language.extra.cuda, which does not compile in Triton 3.4
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


def early(x: Tensor, *, pays: bool = True) -> dict[str, bool]:
    """Arguments of a launch on the device of `x`, for a kernel that calls `follow`; in its turn unless that `pays`."""
    return {"EARLY": True, "launch_pdl": True} if pays and card(x.device).early else {"EARLY": False}
