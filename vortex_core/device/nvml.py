"""NVML: the processes on a card, its clocks, its driver. It only observes: whatever fails, the answer is None.

The installed `pynvml` may be NVIDIA's module of any age, an older package of another author, or something else of that
name. Drivers lack calls, and raise errors that no version of the module names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from ..utils.packages import first_line, missing

log = logging.getLogger(__name__)

T = TypeVar("T")


def ask(question: Callable[[Any], T]) -> T | None:
    """The result of `question(pynvml)`, with the module initialized; None where anything fails."""
    why = missing("pynvml")
    if why is not None:
        log.debug("NVML does not answer: pynvml %s", why)
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return question(pynvml)
        finally:
            with suppress(Exception):
                pynvml.nvmlShutdown()
    except Exception as error:
        log.debug("NVML does not answer: %s", first_line(error))
        return None


def ask_card(device: torch.device, question: Callable[[Any, Any], T]) -> T | None:
    """The result of `question(pynvml, handle)` for a CUDA device; None where anything fails."""

    def of_card(pynvml: Any) -> T:
        # by UUID: NVML counts all cards, torch only those in CUDA_VISIBLE_DEVICES
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return question(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))

    return ask(of_card)
