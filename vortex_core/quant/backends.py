"""Ways to dequantize NF4: Triton, CUDA C, bitsandbytes, plain torch. One is chosen at load, and the log says why."""

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
from ..kernels import ADD_BYTES, Adapter, compiled_declined, fused_declined, reference
from ..nf4 import BLOCK, NF4Weight
from ..utils.packages import first_line, missing

log = logging.getLogger(__name__)


class Backend(ABC):
    """A way to dequantize NF4 weights, into fresh memory, or inside `using` into given buffers.

    A result in a buffer is valid until the next one in the same buffer.
    """

    name: str
    working_bytes = 0  # that it allocates at most to dequantize into given memory, in 16 bits
    eight = False  # whether it has kernels that decode to 8 bits

    def __init__(self) -> None:
        self._scratch: tuple[Tensor, ...] = ()

    @contextmanager
    def using(self, *scratch: Tensor) -> Iterator[None]:
        """Inside, dequantize into these uint8 buffers, each as large as the largest weight for it."""
        self._scratch = scratch
        try:
            yield
        finally:
            self._scratch = ()

    def dequantize(
        self,
        packed: Tensor,
        absmax: Tensor,
        dtype: torch.dtype,
        row_scale: Tensor | None = None,
        scratch: int = 0,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """uint8 `[N, K/2]` and fp32 `[N, K/64]` to `[N, K]` in `dtype`, divided by `row_scale` `[N]` if given.

        The update of an `adapter` is added. Inside `using`, it is written into the buffer of index `scratch`, if there
        is one.
        """
        shape = (packed.shape[0], packed.shape[1] * 2)
        if scratch < len(self._scratch):
            out = self._scratch[scratch][: prod(shape) * dtype.itemsize].view(dtype).view(shape)
        else:
            out = torch.empty(shape, dtype=dtype, device=packed.device)
        self.decode(packed, absmax, out, row_scale, adapter)
        return out

    def allocates(self, dtype: torch.dtype) -> int:
        """Bytes that it allocates at most to dequantize into given memory, in a model of this type."""
        return max(self.working_bytes, ADD_BYTES if dtype == torch.float32 else 0)

    def decode(
        self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None, adapter: Adapter | None = None
    ) -> None:
        """Dequantize into `out`, with the update of an `adapter`.

        In 16 bits it is added to what was rounded, and rounded again, unless a backend does better. To 8 bits it waits
        for the card, and allocates; backends with `eight` do not.
        """
        if adapter is None:
            self.write(packed, absmax, out, row_scale)
        elif row_scale is None:
            self.write(packed, absmax, out, None)
            adapter.add_to(out)
        else:
            reference.dequantize(packed, absmax, out, row_scale, adapter)

    @abstractmethod
    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """Dequantize into `out`."""

    def row_scales(
        self, packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None
    ) -> None:
        """Write into `out`, fp32 `[N]`, what each row is divided by before it is rounded to `dtype`, of 8 bits."""
        reference.row_scales(packed, absmax, out, dtype, adapter)


class ReferenceBackend(Backend):
    """Plain torch; the oracle, and the fallback that runs wherever torch runs."""

    name = "reference"
    working_bytes = max(nf4.DEQUANTIZE_BYTES, ADD_BYTES)  # one after the other

    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """See `Backend.write`."""
        reference.dequantize(packed, absmax, out, row_scale)


class TritonBackend(Backend):
    """Vortex' own kernel, near the speed of memory; to 8 bits, too."""

    name = "triton"
    eight = True

    def decode(
        self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None, adapter: Adapter | None = None
    ) -> None:
        """See `Backend.decode`. An update is added before the one rounding, but in fp32."""
        from ..kernels import fused

        fused.dequantize(packed, absmax, out, row_scale, adapter)

    write = decode

    def row_scales(
        self, packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None
    ) -> None:
        """See `Backend.row_scales`."""
        from ..kernels import fused

        fused.row_scales(packed, absmax, out, dtype, adapter)


class NvrtcBackend(Backend):
    """Vortex' kernel in CUDA C, as fast; for cards without Triton."""

    name = "nvrtc"
    eight = True

    def decode(
        self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None, adapter: Adapter | None = None
    ) -> None:
        """See `Backend.decode`. An update is added before the one rounding, but in fp32."""
        from ..kernels import compiled

        compiled.dequantize(packed, absmax, out, row_scale, adapter)

    write = decode

    def row_scales(
        self, packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None
    ) -> None:
        """See `Backend.row_scales`."""
        from ..kernels import compiled

        compiled.row_scales(packed, absmax, out, dtype, adapter)


class BitsAndBytesBackend(Backend):
    """bitsandbytes' kernels, to 16 and 32 bits only."""

    name = "bitsandbytes"
    working_bytes = ADD_BYTES

    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        """See `Backend.write`."""
        if row_scale is not None:  # it has no kernel for that, and no precision of 8 bits
            reference.dequantize(packed, absmax, out, row_scale)
            return
        arguments = (packed.view(-1, 1), absmax.view(-1), BLOCK, "nf4", list(out.shape), out.dtype)
        if packed.device.type == "cuda":
            torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        else:  # it has no variant here that writes into given memory
            out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(*arguments))


_KINDS = {kind.name: kind for kind in (TritonBackend, NvrtcBackend, BitsAndBytesBackend, ReferenceBackend)}
BACKENDS = tuple(_KINDS)  # the fastest first
_CHOICE = "'triton', 'nvrtc', 'bitsandbytes' or 'reference'"


def choose_backend(device: torch.device, name: str | None = None) -> Backend:
    """The NF4 backend for `device`: `name` if given, else the fastest that works here. Logs the choice and why.

    On the CPU that is plain torch: bitsandbytes is no faster there, and takes seconds to import.
    Raises `VortexInputError` for an unknown name, or for a named backend that does not work on this machine.
    """
    if name not in (None, *BACKENDS):
        raise VortexInputError(f"Unknown backend {quoted(name)}; choose {_CHOICE}.")
    reasons: list[str] = []
    fastest = BACKENDS if device.type == "cuda" else BACKENDS[-1:]
    for candidate in fastest if name is None else (name,):
        declined = backend_declined(candidate, device)
        if declined is None:
            why = "asked for" if name else "; ".join(reasons) or "the fastest"
            slow = bool(reasons) and candidate == "reference"
            log.log(logging.WARNING if slow else logging.INFO, "NF4 backend: %s on %s (%s)", candidate, device, why)
            if candidate == "reference":
                nf4.pairs_of(device)  # now: it stays, and a capture could not make it
            return _KINDS[candidate]()
        reasons.append(f"{candidate} declined: {declined}")
    raise VortexInputError(f"The {name} backend does not work on {device}: {declined}")


def backend_declined(name: str, device: torch.device) -> str | None:
    """Why a backend cannot dequantize on `device`, or None."""
    if name == "triton":
        return fused_declined(device)
    if name == "nvrtc":
        return compiled_declined(device)
    return bitsandbytes_declined(device) if name == "bitsandbytes" else None


def bitsandbytes_declined(device: torch.device) -> str | None:
    """Why bitsandbytes cannot dequantize on `device`, or None if a sample is equal to the reference.

    Raises torch's `OutOfMemoryError`.
    """
    why = missing("bitsandbytes")
    if why is not None:
        return f"it {why}"
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    sample = NF4Weight(packed, torch.linspace(0.5, 2, 8, device=device).view(4, 2))
    try:
        found = BitsAndBytesBackend().dequantize(sample.packed, sample.absmax, torch.float32)
    except torch.OutOfMemoryError:  # says nothing about bitsandbytes
        raise
    except Exception as error:  # of any kind: this backend does not work here
        return first_line(error)
    return None if torch.equal(found, nf4.dequantize(sample, torch.float32)) else "a sample differs from the reference"
