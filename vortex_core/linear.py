"""One NF4 linear: decode the weight into a shared workspace, then the library's product.

FLUX's matrices meet hundreds of tokens at once, where bitsandbytes' own 4-bit product also decodes the whole
weight first, into fresh memory each time. Decoding into one buffer that every layer reuses gives the same
numbers and allocates nothing. A backend is a way to decode; it is chosen once, at load, and says why.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import nf4
from .errors import VortexInputError
from .nf4 import BLOCK, NF4Weight

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Decodes NF4 weights. The result is valid until the next `decode` of the same backend."""

    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of the workspace it keeps on the device."""
        ...

    def reserve(self, numel: int, dtype: torch.dtype) -> None:
        """Make room for weights of up to `numel` values, so that decoding them allocates nothing."""
        ...

    def release(self) -> None:
        """Give the workspace back; the next `decode` or `reserve` takes it again."""
        ...

    def decode(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 `[N, K/2]` and fp32 `[N, K/64]` to `[N, K]` in `dtype`."""
        ...


class ReferenceBackend:
    """Plain torch; the oracle, and the fallback that runs wherever torch runs."""

    name = "reference"
    nbytes = 0

    def reserve(self, numel: int, dtype: torch.dtype) -> None:
        """Plain torch allocates its intermediates itself."""

    def release(self) -> None:
        """There is nothing to give back."""

    def decode(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Backend.decode`."""
        return nf4.dequantize(NF4Weight(packed, absmax), dtype)


class BitsAndBytesBackend:
    """bitsandbytes' decode kernels; on CUDA they write into the shared workspace."""

    name = "bitsandbytes"

    def __init__(self, device: torch.device) -> None:
        self.workspace = torch.empty(0, device=device)

    def reserve(self, numel: int, dtype: torch.dtype) -> None:
        """See `Backend.reserve`."""
        if self.workspace.device.type == "cuda" and (self.workspace.numel() < numel or self.workspace.dtype != dtype):
            self.workspace = torch.empty(numel, dtype=dtype, device=self.workspace.device)

    @property
    def nbytes(self) -> int:
        """See `Backend.nbytes`."""
        return self.workspace.numel() * self.workspace.element_size()

    def release(self) -> None:
        """See `Backend.release`."""
        self.workspace = self.workspace.new_empty(0)

    def decode(self, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Backend.decode`."""
        shape = [packed.shape[0], packed.shape[1] * 2]
        arguments = (packed.view(-1, 1), absmax.view(-1), BLOCK, "nf4", shape, dtype)
        if packed.device.type != "cuda":  # bitsandbytes has no out= variant for the CPU
            return torch.ops.bitsandbytes.dequantize_4bit.default(*arguments)
        numel = shape[0] * shape[1]
        self.reserve(numel, dtype)
        out = self.workspace[:numel].view(shape)
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)
        return out


class NF4Linear(nn.Module):
    """`x @ W.T + b` with W in NF4. `x` `[..., K]` in any float type, which is also the type of the product.

    The buffers are `packed` and `absmax`, never `weight`: transformers' T5 casts its input to `wo.weight.dtype`,
    and a packed weight would turn it into integers.
    """

    weight = None
    packed: Tensor
    absmax: Tensor
    bias: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None, backend: Backend) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("bias", bias)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return F.linear(x, self.backend.decode(self.packed, self.absmax, x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes and backend, for `print(model)`."""
        n, half_k = self.packed.shape
        return f"in_features={half_k * 2}, out_features={n}, backend={self.backend.name}"


def choose_backend(device: torch.device, name: str | None = None) -> Backend:
    """The NF4 backend for `device`: `name` if given, else the fastest that works here. Logs the choice and why.

    Raises `VortexInputError` for an unknown name, or for a named backend that does not work on this machine.
    """
    if name not in (None, "bitsandbytes", "reference"):
        raise VortexInputError(f"Unknown backend {name!r}; choose 'bitsandbytes' or 'reference'.")
    if name == "reference":
        log.info("NF4 backend: reference (asked for)")
        return ReferenceBackend()
    declined = bitsandbytes_declined(device)
    if declined is None:
        log.info("NF4 backend: bitsandbytes on %s (%s)", device, "asked for" if name else "its decode works here")
        return BitsAndBytesBackend(device)
    if name == "bitsandbytes":
        raise VortexInputError(f"The bitsandbytes backend does not work on {device}: {declined}")
    log.warning("NF4 backend: reference, slower; bitsandbytes declined on %s: %s", device, declined)
    return ReferenceBackend()


def bitsandbytes_declined(device: torch.device) -> str | None:
    """Why bitsandbytes cannot decode on `device`, or None if it decodes a sample exactly like the reference."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        # Broken installs fail in many ways (missing library, wrong CUDA); each only means: not this backend.
        return f"it does not import ({error})"
    packed = torch.arange(256, dtype=torch.uint8, device=device).view(4, 64)
    sample = NF4Weight(packed, torch.linspace(0.5, 2, 8, device=device).view(4, 2))
    try:
        decoded = BitsAndBytesBackend(device).decode(sample.packed, sample.absmax, torch.float32)
    except (RuntimeError, AttributeError) as error:
        return str(error).partition("\n")[0]
    if not torch.equal(decoded, nf4.dequantize(sample, torch.float32)):
        return "its decode differs from the reference"
    return None
