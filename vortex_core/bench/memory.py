"""The counters of memory that the VRAM profile and the leak check read, by the names that reports show."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from ..latency import synchronize
from ..vram import snapshot

ALLOCATED, RESERVED, PROCESS, HOST = "torch allocated", "torch reserved", "process (NVML)", "host (RSS)"

Counters = dict[str, int | None]  # bytes by name; None where NVML does not tell


def counters(device: torch.device) -> Counters:
    """Bytes at this moment. On the CPU only the host's."""
    import psutil

    found: Counters = {}
    if device.type == "cuda":
        now = snapshot(device)
        found = {ALLOCATED: now.allocated, RESERVED: now.reserved, PROCESS: now.process}
    return {**found, HOST: int(psutil.Process().memory_info().rss)}


def at_rest(device: torch.device) -> Counters:
    """`counters` once the device has done all it was given, and the host's allocator has given back what is free."""
    synchronize(device)
    with suppress(OSError, AttributeError):  # glibc's; without, a leak may hide for long in what was freed before
        ctypes.CDLL(None).malloc_trim(0)
    return counters(device)
