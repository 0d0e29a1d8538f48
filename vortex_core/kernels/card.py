"""The properties of a card that kernels depend on."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Card(NamedTuple):
    """The number of multiprocessors; bytes of shared memory that one program may take; whether there is a bulk copy
    engine; whether kernels are launched early, which was measured on compute capability 9.0 alone.
    """

    processors: int
    shared: int
    copies: bool
    early: bool


@cache
def card(device: torch.device) -> Card:
    """The card of a CUDA device; for the CPU, where Triton interprets, a small one."""
    if device.type != "cuda":
        return Card(1, 1 << 18, copies=True, early=False)
    found = torch.cuda.get_device_properties(device)
    shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Card(
        found.multi_processor_count, shared, copies=found.major >= 9, early=(found.major, found.minor) == (9, 0)
    )
