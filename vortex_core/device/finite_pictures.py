"""Checks that computed pictures are finite: in one pass, without memory, and without waiting for the device."""

from __future__ import annotations

import logging
import math
from collections import deque

import torch
from torch import Tensor

from ..errors import NotFiniteError
from .select import host_buffer

log = logging.getLogger(__name__)

WHY = (
    "Damaged weights do that, and a type too small for their values, such as float16. Download the model again, "
    "or load it with `mode` exact."
)


def total(values: Tensor) -> Tensor:
    """The sum of `values`, a scalar on their device: not finite where one of them is not."""
    return values.sum(dtype=torch.float32 if values.dtype is torch.float16 else None)  # float16 ends at 65,504


def check_finite(values: Tensor, what: str) -> None:
    """Raise `NotFiniteError` where one of `values` is not finite. Waits for their device."""
    if not math.isfinite(total(values).item()):
        raise NotFiniteError(f"{what} is not finite (NaN). {WHY}")


class Verdicts:
    """Checks the pictures of one device: on the CPU at once, on a GPU when the next call looks.

    A GPU still draws when its caller goes on, so nobody waits here: the sum is copied to the host after the picture. A
    caller that copies a picture to the host waits anyway, and uses `check_finite`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[str, Tensor, torch.cuda.Event]] = deque()

    def check(self, pictures: Tensor, what: str) -> None:
        """Raise `NotFiniteError` on the CPU. On a GPU, leave it to `tell`."""
        if self._device.type != "cuda":
            check_finite(pictures, what)
            return
        found = total(pictures)
        fetched = host_buffer(found.shape, found.dtype, self._device).copy_(found, non_blocking=True)
        self._pending.append((what, fetched, torch.cuda.current_stream(self._device).record_event()))

    def tell(self) -> None:
        """Log which of the pictures that are finished by now are not finite."""
        while self._pending and self._pending[0][2].query():
            what, fetched, _ = self._pending.popleft()
            if not math.isfinite(fetched.item()):
                log.error("%s is not finite (NaN). %s", what, WHY)
