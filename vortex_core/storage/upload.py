"""Reads files to a CUDA device, at the speed of the bus.

Several threads read pieces into pinned buffers, which are used again and again, and each piece is copied to the device
while others are read. One thread that reads into fresh memory and then copies takes the time of both.
"""

from __future__ import annotations

import os
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch
from torch import Tensor

from ..memory.host_memory import HostMemory
from ..utils.inference_mode import inference_mode
from .filebytes import FileBytes

PIECE = 4 * 2**20  # bytes; small enough that every thread gets pieces of a weight
THREADS = 8


class Upload:
    """Fills tensors on a CUDA device from files."""

    def __init__(self, device: torch.device) -> None:
        threads = min(THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads, "vortex-upload")
        self._free: SimpleQueue[tuple[Tensor, torch.cuda.Event]] = SimpleQueue()
        with torch.cuda.device(device):
            self._memory = HostMemory(2 * threads * PIECE, pin=True)
            for _ in range(2 * threads):
                self._free.put((self._memory.take(PIECE), torch.cuda.Event(blocking=True)))

    def __call__(self, file: FileBytes, offset: int, target: Tensor) -> None:
        """Fill a contiguous tensor with the bytes at `offset`, in the device's current stream. Raises `OSError`."""
        stream = torch.cuda.current_stream(target.device)
        pieces = target.view(-1).view(torch.uint8).split(PIECE)
        *others, last = ((file, offset + i * PIECE, piece, stream) for i, piece in enumerate(pieces))
        jobs = [self._threads.submit(self._send, *other) for other in others]
        try:
            self._send(*last)
        finally:
            wait(jobs)  # after an error, too, no thread may write to the target later
        for job in jobs:
            job.result()

    def _send(self, file: FileBytes, offset: int, target: Tensor, stream: torch.cuda.Stream) -> None:
        buffer, sent = self._free.get()
        try:
            with inference_mode():  # as the target may be a tensor of that mode
                sent.synchronize()  # until the copy out of this buffer is done
                pinned = buffer[: target.numel()]
                file.read(offset, pinned.numpy().data)
                with torch.cuda.stream(stream):
                    target.copy_(pinned, non_blocking=True)
                    sent.record()
        finally:
            self._free.put((buffer, sent))


# each as long as files hold it, so that its pinned memory is freed after loading
_uploads: weakref.WeakValueDictionary[torch.device, Upload] = weakref.WeakValueDictionary()


def upload_to(device: torch.device) -> Upload:
    """The one `Upload` to a device; a new one where none is held."""
    upload = _uploads.get(device)
    if upload is None:
        upload = _uploads[device] = Upload(device)
    return upload
