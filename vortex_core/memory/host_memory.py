"""Host memory that a GPU reads and writes by itself, or ordinary memory where none can be pinned."""

from __future__ import annotations

import weakref
from contextlib import suppress
from mmap import PAGESIZE
from typing import Any

import torch
from torch import Tensor

from ..device.jobs import warn
from ..errors import VortexWarning
from .arena import Region


class HostMemory:
    """A stretch of host memory that tensors are cut from; pinned where `pin`, pageable with a warning if not.

    Ordinary memory, registered with the driver: torch's own pinned allocator rounds each block to a power of two,
    which would cost a GB and a half for the weights that stream.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        self._region, self.pinned = Region(torch.empty(size, dtype=torch.uint8)), 0
        if not (pin and size):
            return
        memory = self._region.memory
        memory[::PAGESIZE].zero_()  # fresh pages come from all cores here, while registering has only one
        reason = _register(memory)
        if reason is None:
            self.pinned = size
            weakref.finalize(self, _unregister, memory)
        else:
            warn(
                f"No pinned host memory for {size / 1e9:.2f} GB ({reason}); copies to a GPU are slower.",
                VortexWarning,
            )

    def take(self, size: int) -> Tensor:
        """The next `size` bytes."""
        return self._region.take((size,), torch.uint8)


def _register(memory: Tensor) -> str | None:
    """Pin; why not, where it fails."""
    try:
        runtime: Any = torch.cuda.cudart()
        error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 1)  # portable: for every card's context
        if int(error) == 0:
            return None
    except (AssertionError, RuntimeError) as missing:  # a torch without CUDA asserts
        return str(missing).partition("\n")[0]
    with suppress(RuntimeError, AssertionError):  # the next launch would report this error as its own
        torch.zeros(1, device="cuda").add_(1)
    return str(runtime.cudaGetErrorString(error))


def _unregister(memory: Tensor) -> None:
    with suppress(RuntimeError):  # the device is lost, and its driver keeps nothing for us
        torch.cuda.synchronize()  # a copy may still be on its way
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(memory.data_ptr())
