"""NVML: who is on a card, its clocks, its driver. It only observes, so whatever goes wrong, the answer is None.

What is installed as `pynvml` may be NVIDIA's module of any age, an older package of another author, or something else
of that name; drivers lack calls, and raise errors that no version of the module names.
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
    """What `question` answers of the module pynvml, initialized; None where that fails in any way."""
    why = missing("pynvml")
    if why is not None:
        log.debug("NVML does not tell: pynvml %s", why)
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
        log.debug("NVML does not tell: %s", first_line(error))
        return None


def ask_card(device: torch.device, question: Callable[[Any, Any], T]) -> T | None:
    """`ask`, of a CUDA device: the question is given the module and the card's handle."""

    def of_card(pynvml: Any) -> T:
        # by UUID: NVML counts all cards, torch only those CUDA_VISIBLE_DEVICES leaves
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return question(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))

    return ask(of_card)
