"""The working memory of an engine: one block, in which everything that a call needs has its place by offset.

Nothing in it is allocated or freed while a call runs, so what a call takes is a sum that is known before it starts, the
same under every allocator, and addresses stay what they are until the block is released. What one phase of a call no
longer needs, the next one uses: phases lay out their tensors from the block's start, each on its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

ALIGN = 256  # bytes; what the CUDA allocator itself guarantees, so no kernel sees a stranger alignment
MIB = 2**20
Shape = tuple[tuple[int, ...], torch.dtype]  # and type
Views = dict[tuple[int, tuple[int, ...], torch.dtype], Tensor]  # by offset, shape and type


def round_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def aligned(size: int) -> int:
    """`size` with the room to the next tensor."""
    return round_up(size, ALIGN)


class Region:
    """A stretch of memory that tensors are cut from, one after another; `used` is where the next one starts.

    `views` remembers them, since making a view takes longer than finding one: as long as the memory is the same.
    """

    def __init__(self, memory: Tensor, start: int = 0, views: Views | None = None) -> None:
        """`memory`: uint8, one dimension."""
        self.memory, self.used, self._views = memory, start, {} if views is None else views

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor, uninitialized. Raises `ValueError` where the memory ends before."""
        start, size = self.used, prod(shape) * dtype.itemsize
        if start + size > self.memory.numel():
            raise ValueError(f"A plan is too small: {start + size} of {self.memory.numel()} bytes.")
        self.used = start + aligned(size)
        key = (start, shape, dtype)
        if key not in self._views:
            self._views[key] = self.memory[start : start + size].view(dtype).view(shape)
        return self._views[key]

    def again(self, start: int) -> Region:
        """The same stretch from `start` on."""
        return Region(self.memory, start, self._views)


def laid_out(shapes: Iterable[Shape]) -> int:
    """Bytes that tensors of these shapes and types take in a region."""
    return sum(aligned(prod(shape) * dtype.itemsize) for shape, dtype in shapes)


def block(nbytes: int, device: torch.device) -> Tensor:
    """Memory to cut regions from, uninitialized. Raises torch's `OutOfMemoryError`."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
