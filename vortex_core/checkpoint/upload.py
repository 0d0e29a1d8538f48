"""Host memory to a CUDA device, at the speed of the bus.

A plain copy from a mapped file faults pages in and passes them on in one thread. Copied piece by piece into pinned
memory, all cores fault and copy, and the device fetches one piece while the next is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 32 * 2**20  # bytes; two are kept


class Upload:
    """Copies tensors to `device` through two pinned buffers. Not for several threads at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._turn = 0
        try:
            self._buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        except RuntimeError:  # no pinned memory to be had: slower, not wrong
            self._buffers = []
        with torch.cuda.device(device):
            self._sent = [torch.cuda.Event() for _ in self._buffers]

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous CPU tensor, ordered like any other work of the device's current stream."""
        if not self._buffers:
            return tensor.to(self.device)
        copy = torch.empty_like(tensor, device=self.device)
        pieces = (t.view(-1).view(torch.uint8).split(PIECE) for t in (tensor, copy))
        with torch.cuda.device(self.device):
            for source, target in zip(*pieces, strict=True):
                self._send(source, target)
        return copy

    @torch.inference_mode()  # which the buffers may have been made in
    def _send(self, source: Tensor, target: Tensor) -> None:
        sent = self._sent[self._turn]
        pinned = self._buffers[self._turn][: source.numel()]
        self._turn = 1 - self._turn
        sent.synchronize()  # the piece before last, which lay here
        target.copy_(pinned.copy_(source), non_blocking=True)
        sent.record()
