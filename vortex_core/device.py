"""The device to run on, and host memory that it can read."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .errors import VortexDeviceError, quoted

log = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)  # native bf16: RTX 30 series and later


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: as given, else the first CUDA device, else the CPU.

    Raises `VortexDeviceError` where it is missing, or is a GPU below compute capability 8.0 (no native bf16).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:  # no such name; no name at all
        raise VortexDeviceError(f"{quoted(device)} is not a device; give 'cuda', 'cuda:1' or 'cpu'.") from error
    if where.type == "cpu":
        return where
    if where.type != "cuda":
        raise VortexDeviceError(f"Vortex runs on CUDA and on the CPU, not on {where.type!r}.")
    if torch.cuda._is_in_bad_fork():
        raise VortexDeviceError("CUDA works in no forked process. Start it by spawn, or use device='cpu'.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = where.index or 0
    if index >= count:
        raise VortexDeviceError(
            f"There is no {where}: torch sees {count} CUDA devices. Use device='cpu', or check the driver and "
            "the torch build with `vortex doctor`."
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        raise VortexDeviceError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; FLUX "
            "needs native bf16, so 8.0 or higher (RTX 30 series and later)."
        )
    return torch.device("cuda", index)


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory, uninitialized; pinned where `device` is a GPU, so that nobody waits for copies, if there is any."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    except RuntimeError as error:
        log.info("No pinned host memory (%s); copies to the device are waited for", str(error).partition("\n")[0])
        return torch.empty(shape, dtype=dtype, device="cpu")
