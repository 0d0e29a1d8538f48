"""Pinned host memory, which a GPU copies to and from by itself, or pageable memory where pinning fails."""

from __future__ import annotations

import weakref
from contextlib import suppress
from mmap import PAGESIZE
from typing import Any

import torch
from torch import Tensor

from ..device.jobs import warn
from ..errors import VortexWarning
from ..utils.packages import first_line
from .arena import Region


class HostMemory:
    """Host memory that tensors are cut from, pinned if `pin`. Where that fails it is pageable, with a warning.

    It is ordinary memory, registered with the driver. torch's pinned allocator (as in `device.select.host_buffer`)
    rounds each block to a power of two, which would cost 1.5 GB for the weights that stream.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        self._region, self.pinned = Region(torch.empty(size, dtype=torch.uint8)), 0
        if not (pin and size):
            return
        memory = self._region.memory
        memory[::PAGESIZE].zero_()  # all cores make the pages here; registering would, on one core
        reason = _register(memory)
        if reason is None:
            self.pinned = size
            weakref.finalize(self, _unregister, memory)
        else:
            warn(
                f"No pinned host memory for {size / 1e9:.2f} GB ({reason}); copies to a GPU are slower.",
                VortexWarning,
            )

    @property
    def address(self) -> int:
        """Where it starts."""
        return self._region.memory.untyped_storage().data_ptr()

    def take(self, size: int) -> Tensor:
        """The next `size` bytes."""
        return self._region.take((size,), torch.uint8)


def _register(memory: Tensor) -> str | None:
    """Pin `memory`. Returns why that failed, or None."""
    try:
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 1)  # portable: for every card's context
        if int(status) == 0:
            return None
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        return first_line(error)
    with suppress(RuntimeError, AssertionError):  # the next launch would report this error as its own
        torch.zeros(1, device="cuda").add_(1)
    return str(runtime.cudaGetErrorString(status))


def _unregister(memory: Tensor) -> None:
    with suppress(RuntimeError):  # the device is lost, and the driver has freed everything
        torch.cuda.synchronize()  # a copy may still run
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(memory.data_ptr())
