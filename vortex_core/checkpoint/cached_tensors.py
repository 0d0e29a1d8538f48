"""A part's tensors out of the cache, even if its entry is damaged or removed while they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..nf4 import NF4Weight, dequantize
from ..storage.materialize import Target, read_nf4
from ..storage.tensors import Stored
from .cache_entry import CPU, DamagedEntry
from .dialects import Part

T = TypeVar("T", Tensor, NF4Weight)


class CachedTensors:
    """The tensors of an entry, a `Tensors`. A damaged entry is written anew, once; after that the part itself is read.

    `again(stored, error)` writes a new entry in the place of `stored`, or returns None where it cannot.
    """

    def __init__(
        self, stored: Stored, again: Callable[[Stored, Exception], Stored | None], part: Part, target: Target
    ) -> None:
        # headers are checked already; the data is checked when it is read
        self.where, self.names, self.shape, self.nbytes = stored.where, stored.names, stored.shape, stored.nbytes
        self.check, self.is_nf4, self._has = stored.check, stored.is_nf4, stored.__contains__
        self._stored: Stored | None = stored
        self._again: Callable[[Stored, Exception], Stored | None] | None = again
        self._part = part
        self._target = replace(target, progress=lambda nbytes: None)

    def __contains__(self, name: str) -> bool:
        return self._has(name)

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """See `Stored.read`."""
        if self.is_nf4(name):
            return dequantize(self.read_nf4(name, device), torch.float32)
        return self._read(
            lambda stored: stored.read(name, device),
            lambda: self._part.tensors.read(name, device).view(self.shape(name)),
        )

    def read_nf4(self, name: str, device: torch.device | str = CPU) -> NF4Weight:
        """See `Stored.read_nf4`."""
        return self._read(
            lambda stored: stored.read_nf4(name, device),
            lambda: read_nf4(self._part.tensors, name, self._target, torch.device(device)),
        )

    def settle(self) -> None:
        """See `Stored.settle`."""
        for tensors in (self._stored, self._part.tensors):
            if tensors is not None:
                tensors.settle()

    def _read(self, from_entry: Callable[[Stored], T], from_part: Callable[[], T]) -> T:
        while self._stored is not None:
            try:
                return from_entry(self._stored)
            except (DamagedEntry, OSError) as error:
                again, self._again = self._again, None  # once: a disk that damages two entries would damage more
                self._stored = again(self._stored, error) if again is not None else None
        return from_part()
