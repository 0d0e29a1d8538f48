"""Ways to decode NF4 weights: Triton's, bitsandbytes', plain torch's. One is chosen at load, and the log says why."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from .. import nf4
from ..errors import VortexInputError, quoted
from ..kernels import fused_declined, reference
from ..nf4 import BLOCK, NF4Weight
from ..utils.packages import first_line, missing

log = logging.getLogger(__name__)


class Backend(ABC):
    """A way to decode NF4 weights. The result is valid until the next `decode` on the same lane.

    Inside `using` it lies in memory that is given, and else in fresh memory.
    """

    name: str

    def __init__(self) -> None:
        self._lanes: tuple[Tensor, ...] = ()

    @contextmanager
    def using(self, *lanes: Tensor) -> Iterator[None]:
        """Decode into these uint8 buffers, as large as the largest weight that comes."""
        self._lanes = lanes
        try:
            yield
        finally:
            self._lanes = ()

    def decode(
        self, packed: Tensor, absmax: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None, lane: int = 0
    ) -> Tensor:
        """uint8 `[N, K/2]` and fp32 `[N, K/64]` to `[N, K]` in `dtype`, divided by `row_scale` `[N]` if given.

        A result on one `lane` (0 or 1) does not end the other's.
        """
        shape = (packed.shape[0], packed.shape[1] * 2)
        if lane < len(self._lanes):
            out = self._lanes[lane][: prod(shape) * dtype.itemsize].view(dtype).view(shape)
        else:
            out = torch.empty(shape, dtype=dtype, device=packed.device)
        self.write(packed, absmax, out, row_scale)
        return out

    @abstractmethod
    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """Decode into `out`."""


class ReferenceBackend(Backend):
    """Plain torch; the oracle, and the fallback that runs wherever torch runs."""

    name = "reference"

    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """See `Backend.write`."""
        reference.decode(packed, absmax, out, row_scale)


class TritonBackend(Backend):
    """Vortex's own decode kernels, near the speed of memory; the ones that decode to fp8 too."""

    name = "triton"

    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """See `Backend.write`."""
        from ..kernels import fused

        fused.decode(packed, absmax, out, row_scale)


class BitsAndBytesBackend(Backend):
    """bitsandbytes' decode kernels, in 16 and 32 bits only."""

    name = "bitsandbytes"

    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """See `Backend.write`."""
        if row_scale is not None:  # not one of its kernels; `fast` on a GPU has the Triton backend
            reference.decode(packed, absmax, out, row_scale)
            return
        arguments = (packed.view(-1, 1), absmax.view(-1), BLOCK, "nf4", list(out.shape), out.dtype)
        if packed.device.type == "cuda":
            torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        else:  # where it has no variant that writes into given memory
            out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*arguments))


BACKENDS = ("triton", "bitsandbytes", "reference")  # the fastest first


def choose_backend(device: torch.device, name: str | None = None) -> Backend:
    """The NF4 backend for `device`: `name` if given, else the fastest that works here. Logs the choice and why.

    On the CPU that is plain torch: bitsandbytes decodes no faster there, and takes seconds to import.
    Raises `VortexInputError` for an unknown name, or for a named backend that does not work on this machine.
    """
    if name not in (None, *BACKENDS):
        raise VortexInputError(f"Unknown backend {quoted(name)}; choose 'triton', 'bitsandbytes' or 'reference'.")
    reasons: list[str] = []
    fastest = BACKENDS if device.type == "cuda" else BACKENDS[-1:]
    for candidate in fastest if name is None else (name,):
        declined = backend_declined(candidate, device)
        if declined is None:
            why = "asked for" if name else "; ".join(reasons) or "the fastest"
            slow = bool(reasons) and candidate == "reference"
            log.log(logging.WARNING if slow else logging.INFO, "NF4 backend: %s on %s (%s)", candidate, device, why)
            return _backend(candidate)
        reasons.append(f"{candidate} declined: {declined}")
    raise VortexInputError(f"The {name} backend does not work on {device}: {declined}")


def backend_declined(name: str, device: torch.device) -> str | None:
    """Why a backend cannot decode on `device`, or None."""
    if name == "triton":
        return fused_declined(device)
    return bitsandbytes_declined(device) if name == "bitsandbytes" else None


def _backend(name: str) -> Backend:
    return next(kind for kind in (TritonBackend, BitsAndBytesBackend, ReferenceBackend) if kind.name == name)()


def bitsandbytes_declined(device: torch.device) -> str | None:
    """Why bitsandbytes cannot decode on `device`, or None if it decodes a sample exactly like the reference.

    Raises torch's `OutOfMemoryError`.
    """
    why = missing("bitsandbytes")
    if why is not None:
        return f"it {why}"
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    sample = NF4Weight(packed, torch.linspace(0.5, 2, 8, device=device).view(4, 2))
    try:
        decoded = BitsAndBytesBackend().decode(sample.packed, sample.absmax, torch.float32)
    except torch.OutOfMemoryError:  # which says nothing of this install
        raise
    except Exception as error:  # of many kinds, and each only means: not this backend
        return first_line(error)
    if not torch.equal(decoded, nf4.dequantize(sample, torch.float32)):
        return "its decode differs from the reference"
    return None
