"""Where weights live: on the device for good, or in pinned host memory and streamed through a staging buffer.

A unit (one T5 block, one modulation linear) is a module whose tensors are laid out in one flat host buffer.
Its tensors are views into a staging buffer on the device that all units share; a hook copies the unit in just
before it runs. One copy a unit, no allocation, and the device holds one unit at a time.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .errors import VortexWarning

log = logging.getLogger(__name__)

ALIGN = 256  # bytes; what the CUDA allocator itself guarantees, so no kernel sees a stranger alignment


class Streamed:
    """A module that lives in host memory and visits the staging buffer to run. `nbytes` is its size there."""

    def __init__(self, module: nn.Module) -> None:
        self.slots: list[tuple[Tensor, int]] = []  # each tensor of the module, and its offset in the flat buffer
        self.nbytes = 0
        for tensor in _tensors(module):
            self.slots.append((tensor, self.nbytes))
            self.nbytes += -(-tensor.numel() * tensor.element_size() // ALIGN) * ALIGN
        self.host = _host_buffer(self.nbytes)
        for tensor, offset in self.slots:
            source = tensor.data.contiguous().view(-1).view(torch.uint8)
            self.host[offset : offset + source.numel()].copy_(source)
        self.bind(self.host)
        module.register_forward_pre_hook(self._load)

    def bind(self, buffer: Tensor) -> None:
        """Turn the module's tensors into views of `buffer` (uint8, at least `nbytes`)."""
        for tensor, offset in self.slots:
            span = buffer[offset : offset + tensor.numel() * tensor.element_size()]
            tensor.data = span.view(tensor.dtype).view(tensor.shape)
        self.buffer = buffer[: self.nbytes]

    def _load(self, module: nn.Module, inputs: object) -> None:
        self.buffer.copy_(self.host, non_blocking=True)


class Staging:
    """One buffer on `device`, as large as the largest of `units`, through which all of them run.

    Units must not be nested, and must run one after another on one CUDA stream. `nbytes` is the buffer's size.
    """

    def __init__(self, units: Iterable[nn.Module], device: torch.device) -> None:
        self.units = [Streamed(unit) for unit in units]
        self.device = device
        self.nbytes = max(unit.nbytes for unit in self.units)
        self.allocate()
        total = sum(unit.nbytes for unit in self.units)
        log.info(
            "%d units, %.2f GB, stream from host memory through %.2f GB on %s",
            len(self.units),
            total / 1e9,
            self.nbytes / 1e9,
            device,
        )

    def allocate(self) -> None:
        """Take the buffer; units can run."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        for unit in self.units:
            unit.bind(buffer)

    def release(self) -> None:
        """Give the buffer back; the units rest in host memory."""
        for unit in self.units:
            unit.bind(unit.host)


def nbytes(*modules: nn.Module) -> int:
    """Bytes that the parameters and buffers of `modules` take."""
    return sum(t.numel() * t.element_size() for module in modules for t in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _host_buffer(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"No pinned host memory for {size / 1e9:.2f} GB ({reason}); new prompts will encode more slowly.",
            VortexWarning,
            stacklevel=2,
        )
        return torch.empty(size, dtype=torch.uint8)
