"""Pictures on their way out: whether what a device computed is finite. One pass, no memory, and nobody waits for it."""

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
    """The sum of `values`, a scalar where they are: not finite where one of them is not."""
    return values.sum(dtype=torch.float32 if values.dtype is torch.float16 else None)  # which ends at 65,504


def check_finite(values: Tensor, what: str) -> None:
    """Raise `NotFiniteError` where one of `values` is not; it waits for the device that has them."""
    if not math.isfinite(total(values).item()):
        raise NotFiniteError(f"{what} is not finite (NaN). {WHY}")


class Verdicts:
    """Of the pictures of one device. On the CPU they are checked at once.

    A GPU draws on while its caller goes on. So the sum is fetched behind the picture, without waiting, and looked at by
    the next call; whoever takes a picture off the device, and so waits for it anyway, checks that for himself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[str, Tensor, torch.cuda.Event]] = deque()

    def check(self, pictures: Tensor, what: str) -> None:
        """Raise `NotFiniteError` on the CPU; elsewhere have `tell` do it in the log."""
        if self._device.type != "cuda":
            check_finite(pictures, what)
            return
        found = total(pictures)
        fetched = host_buffer(found.shape, found.dtype, self._device).copy_(found, non_blocking=True)
        self._pending.append((what, fetched, torch.cuda.current_stream(self._device).record_event()))

    def tell(self) -> None:
        """Log those pictures, drawn by now, that are not finite."""
        while self._pending and self._pending[0][2].query():
            what, fetched, _ = self._pending.popleft()
            if not math.isfinite(fetched.item()):
                log.error("%s is not finite (NaN). %s", what, WHY)
