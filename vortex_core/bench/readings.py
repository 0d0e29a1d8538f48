"""The memory counters of the VRAM profile and the leak check, by the names that reports show."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from ..device.vram import snapshot
from ..utils.packages import missing
from ..utils.timing import synchronize

ALLOCATED, RESERVED, PROCESS, HOST = "torch allocated", "torch reserved", "process (NVML)", "host (RSS)"

Counters = dict[str, int | None]  # bytes by name; None where unknown


def counters(device: torch.device) -> Counters:
    """Bytes at this moment. On the CPU only the host's."""
    found: Counters = {}
    if device.type == "cuda":
        now = snapshot(device)
        found = {ALLOCATED: now.allocated, RESERVED: now.reserved, PROCESS: now.process}
    return {**found, HOST: _resident()}


def _resident() -> int | None:
    """Bytes of host memory that this process has, or None where unknown."""
    if missing("psutil") is not None:
        return None
    import psutil

    with suppress(Exception):  # where /proc is hidden it raises many kinds
        return int(psutil.Process().memory_info().rss)
    return None


def at_rest(device: torch.device) -> Counters:
    """`counters` once the device has finished, and the host's allocator has given free memory back."""
    synchronize(device)
    with suppress(OSError, AttributeError):  # glibc only; without it a leak may hide in memory that was freed before
        ctypes.CDLL(None).malloc_trim(0)
    return counters(device)
