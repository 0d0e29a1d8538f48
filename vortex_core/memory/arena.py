"""The working memory of an engine: one block, in which every tensor of a call has a fixed offset.

Nothing is allocated or freed while a call runs. So a call's memory is a sum, known before it starts and the same under
every allocator, and addresses stay the same until the block is released. The phases of a call take turns: each lays out
its tensors from the block's start, over those of the phase before.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

ALIGN = 256  # bytes; what the CUDA allocator guarantees, so kernels see no other alignment
MIB = 2**20
Shape = tuple[tuple[int, ...], torch.dtype]  # of a tensor, with its type
Views = dict[tuple[int, tuple[int, ...], torch.dtype], Tensor]  # by offset, shape and type


def round_up(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`."""
    return -(-size // step) * step


def aligned(size: int) -> int:
    """Bytes from a tensor of `size` bytes to the next one."""
    return round_up(size, ALIGN)


class Region:
    """Memory that tensors are cut from, one after another; `used` is the offset of the next one.

    `views` keeps them for later regions of the same memory, since a view takes longer to make than to look up.
    """

    def __init__(self, memory: Tensor, start: int = 0, views: Views | None = None) -> None:
        """`memory`: uint8, one dimension."""
        self.memory, self.used, self._views = memory, start, {} if views is None else views

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, uninitialized. Raises `ValueError` where the memory is too small for it."""
        start, size = self.used, prod(shape) * dtype.itemsize
        if start + size > self.memory.numel():
            raise ValueError(f"A plan is too small: {start + size} of {self.memory.numel()} bytes.")
        self.used = start + aligned(size)
        key = (start, shape, dtype)
        if key not in self._views:
            self._views[key] = self.memory[start : start + size].view(dtype).view(shape)
        return self._views[key]

    def again(self, start: int) -> Region:
        """A region of the same memory from offset `start` on."""
        return Region(self.memory, start, self._views)


def laid_out(shapes: Iterable[Shape]) -> int:
    """Bytes that tensors of these shapes and types take in a region."""
    return sum(aligned(prod(shape) * dtype.itemsize) for shape, dtype in shapes)


def block(nbytes: int, device: torch.device) -> Tensor:
    """Memory to cut regions from, uninitialized. Raises torch's `OutOfMemoryError`."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
