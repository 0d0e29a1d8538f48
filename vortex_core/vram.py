"""What the device's memory holds: torch's two counters, the process as NVML sees it, the whole device.

`allocated` is what tensors take, `reserved` what torch's allocator keeps for them, `process` that plus the CUDA
context and libraries. All in bytes; GB is 10^9.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Bytes at one moment. `process` is None where NVML does not tell (no driver, another PID namespace)."""

    allocated: int
    reserved: int
    process: int | None
    free: int
    total: int


def snapshot(device: torch.device) -> Snapshot:
    """The counters of a CUDA device; zeros on the CPU, which has no VRAM."""
    if device.type != "cuda":
        return Snapshot(allocated=0, reserved=0, process=None, free=0, total=0)
    free, total = torch.cuda.mem_get_info(device)
    return Snapshot(
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        process=process_memory(device),
        free=free,
        total=total,
    )


def process_memory(device: torch.device) -> int | None:
    """Bytes NVML accounts to this process on a CUDA device, or None where it cannot tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        # by UUID: NVML counts all cards, torch only those CUDA_VISIBLE_DEVICES leaves
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    except pynvml.NVMLError as error:
        log.debug("NVML does not tell this process's memory: %s", error)
    finally:
        pynvml.nvmlShutdown()
    return None


def clear_cuda_cache() -> int:
    """Hand torch's unused cached memory back to the driver; the bytes freed. The last resort, not a habit.

    Vortex never calls it between pictures: the next allocation of each size asks the driver again (milliseconds
    each, and a device synchronization), so the next picture is slower.
    """
    if not torch.cuda.is_available():
        log.info("clear_cuda_cache: there is no CUDA device, nothing to free")
        return 0
    gc.collect()
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    freed = before - torch.cuda.memory_reserved()
    log.warning("clear_cuda_cache freed %.2f GB; the next picture pays for allocating it again", freed / 1e9)
    return freed
