"""Samples VRAM in the background while the host runs a prompt, so that peaks between nodes are seen."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import host

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

INTERVAL = 0.05  # seconds
KEPT = 36_000  # samples, half an hour


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes at `seconds` of the clock. None where NVML does not tell."""

    seconds: float
    allocated: int  # by torch's tensors
    reserved: int  # by torch's allocator
    process: int | None  # this process, as NVML sees it
    device: int | None  # everybody on the card, as NVML sees it


class Recorder:
    """One for the process. The thread lives as long as the host's run; samples stay until the next reset."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        self.started = 0.0
        self._thread: threading.Thread | None = None

    def begin(self, device: torch.device, *, reset: bool) -> None:
        """Start sampling a CUDA device until the host's run ends; with `reset`, forget what was before."""
        import torch

        if device.type != "cuda":
            return
        if reset or not self.started:
            self.samples.clear()
            self.started = time.monotonic()
            torch.cuda.reset_peak_memory_stats(device)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, args=(device,), name="vortex-vram", daemon=True)
            self._thread.start()

    def _run(self, device: torch.device) -> None:
        read = reader(device)
        while True:
            self.samples.append(read())
            if not host.is_running():
                return
            time.sleep(INTERVAL)


def reader(device: torch.device) -> Callable[[], Sample]:
    """What takes one sample of a CUDA device, some 50 microseconds of host time."""
    import torch

    nvml = _nvml(device)

    def read() -> Sample:
        process, used = nvml()
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return Sample(time.monotonic(), allocated, reserved, process, used)

    return read


def _nvml(device: torch.device) -> Callable[[], tuple[int | None, int | None]]:
    """NVML's two figures, this process and the whole card; None for both on cards it does not know."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # by UUID: NVML counts all cards, torch only those CUDA_VISIBLE_DEVICES leaves
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except Exception as error:
        log.info("NVML does not tell this card's memory (%s); torch's own counters are left.", error)
        return lambda: (None, None)
    pid = os.getpid()

    def read() -> tuple[int | None, int | None]:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        own = next((process.usedGpuMemory for process in processes if process.pid == pid), None)
        return own, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    return read


recorder = Recorder()
