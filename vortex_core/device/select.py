"""The device to run on, and small buffers in host memory for copies to and from it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import VortexDeviceError, quoted
from ..utils.packages import first_line

log = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)  # native bf16: RTX 30 series and later
KINDS = {  # other devices of torch and ComfyUI, in words
    "mps": "an Apple GPU",
    "xpu": "an Intel GPU",
    "privateuseone": "DirectML",
    "directml": "DirectML",
    "dml": "DirectML",
    "npu": "an Ascend NPU",
    "mlu": "a Cambricon MLU",
    "hpu": "an Intel Gaudi",
    "xla": "a TPU",
}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: as given, else the first CUDA device, else the CPU.

    Raises `VortexDeviceError` where it is missing, of another kind, or below compute capability 8.0 (no native bf16).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:  # no such name; no name at all
        kind = device.partition(":")[0] if isinstance(device, str) else None
        if kind in KINDS:  # its package is not installed
            raise other_device(kind) from error
        raise VortexDeviceError(f"{quoted(device)} is not a device; give 'cuda', 'cuda:1' or 'cpu'.") from error
    if where.type == "cpu":
        return torch.device("cpu")
    if where.type != "cuda":
        raise other_device(where.type)
    if torch.cuda._is_in_bad_fork():
        raise VortexDeviceError("CUDA does not work in a forked process. Start processes by spawn, or use the CPU.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = where.index or 0
    if index >= count:
        raise VortexDeviceError(
            f"There is no {where}: torch sees {count} CUDA devices. Use the CPU, or check the driver and "
            "the torch build with `vortex doctor`."
        )
    try:
        capability = torch.cuda.get_device_capability(index)
    except Exception as error:  # from the driver, on its first call
        raise VortexDeviceError(
            f"{where} does not start ({first_line(error)}). Use the CPU, or see `vortex doctor`."
        ) from error
    if capability < MIN_CAPABILITY:
        raise VortexDeviceError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; FLUX "
            "needs native bf16, so 8.0 or higher (RTX 30 series and later)."
        )
    return torch.device("cuda", index)


def other_device(kind: str) -> VortexDeviceError:
    """The error for a device that is neither CUDA's nor the CPU; `kind` is torch's name for it."""
    return VortexDeviceError(f"Vortex runs on CUDA and on the CPU, not on {device_words(kind)}; use the CPU.")


def device_words(kind: str) -> str:
    """A kind of device in words, with torch's name for it."""
    return f"{KINDS[kind]} ({kind})" if kind in KINDS else repr(kind)


def other_accelerator() -> str | None:
    """The kind of an accelerator that torch sees here and Vortex does not use, or None."""
    try:
        found = torch.accelerator.current_accelerator()
    except Exception as error:  # a broken add-on of torch
        log.debug("torch does not tell its accelerator: %s", error)
        return None
    return None if found is None or found.type in ("cpu", "cuda") else found.type


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory, uninitialized. For a GPU it is pinned, so that no copy is waited for, unless that fails.

    For small buffers: torch rounds pinned blocks to a power of two. Weights take `memory.host_memory.HostMemory`.
    """
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    except RuntimeError as error:
        log.info("No pinned host memory (%s); copies to the device are waited for", first_line(error))
        return torch.empty(shape, dtype=dtype, device="cpu")
