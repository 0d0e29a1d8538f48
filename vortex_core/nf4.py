"""The NF4 format: 16 levels of a normal distribution, one fp32 scale for each 64 values.

`packed` is uint8 `[N, K/2]`, row-major, the first value of a pair in the high nibble; `absmax` is fp32
`[N, K/64]`. That is bitsandbytes' layout (nf4, blocksize 64, no double quantization) with the rows kept visible,
so that matrices can be joined and cut by rows. Level table: QLoRA (Dettmers et al., 2023), appendix E.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .errors import VortexCheckpointError
from .utils.packages import first_line, missing

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # reading headers needs the format, not torch
    import torch
    from torch import Tensor

BLOCK = 64
# Embedders and the last projection are small, and their error would reach every token: they stay unquantized.
UNQUANTIZED = ("img_in", "txt_in", "time_in", "vector_in", "final_layer.linear")
CHUNK = 2**21  # values converted at once
DEQUANTIZE_BYTES = CHUNK * (4 + 2) + 2**16  # a chunk in fp32, its bytes as int32, and the table
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A quantized matrix `[N, K]`: `packed` uint8 `[N, K/2]`, `absmax` fp32 `[N, K/64]`."""

    packed: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the matrix this stands for."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    def to(self, device: torch.device) -> NF4Weight:
        """The same weight on `device`."""
        return NF4Weight(self.packed.to(device), self.absmax.to(device))

    def halves(self) -> tuple[NF4Weight, NF4Weight]:
        """The upper and the lower half of the rows."""
        upper, lower = zip(self.packed.chunk(2), self.absmax.chunk(2), strict=True)
        return NF4Weight(*upper), NF4Weight(*lower)


Quantizer = Callable[["Tensor"], NF4Weight]


def join(weights: Sequence[NF4Weight]) -> NF4Weight:
    """Stack weights by rows, bit for bit: every row of a FLUX matrix is whole blocks, so nothing is re-quantized."""
    import torch

    return NF4Weight(torch.cat([w.packed for w in weights]), torch.cat([w.absmax for w in weights]))


def quantize(weight: Tensor, name: str = "weight") -> NF4Weight:
    """Quantize `[N, K]` (bf16, fp16 or fp32; K divisible by 64) on its device, with bitsandbytes where that works.

    Raises `VortexCheckpointError` where it holds NaN or infinity, which would pass silently into `absmax`.
    """
    n, k = weight.shape
    if k % BLOCK:
        raise VortexCheckpointError(f"{name} is {n} x {k}; NF4 needs the second size divisible by {BLOCK}.")
    import torch

    quantized = _quantizer(weight.device)(weight)
    if not bool(torch.isfinite(quantized.absmax).all()):
        raise VortexCheckpointError(f"{name} holds NaN or infinite values; the file is damaged. Download it again.")
    return quantized


@cache
def _quantizer(device: torch.device) -> Quantizer:
    """The fastest quantizer on `device`. Logs why bitsandbytes was declined."""
    if device.type == "cpu":  # plain torch is as fast here, gives the same bytes, and is imported already
        return quantize_reference
    why = _declined(device)
    if why is None:
        return _quantize_bitsandbytes
    log.warning("NF4 is quantized by plain torch, slower; bitsandbytes declined on %s: %s", device, why)
    return quantize_reference


def _declined(device: torch.device) -> str | None:
    """Why bitsandbytes cannot quantize on `device`, or None if a sample of all levels comes back unchanged."""
    import torch

    why = missing("bitsandbytes.functional")
    if why is not None:
        return why
    sample = torch.tensor(LEVELS, device=device).repeat(2, 2 * BLOCK // len(LEVELS)) * 0.5
    try:
        found = dequantize(_quantize_bitsandbytes(sample), torch.float32)
    except torch.OutOfMemoryError:  # says nothing about bitsandbytes, and must not be cached
        raise
    except Exception as error:  # of any kind: bitsandbytes does not work here
        return first_line(error)
    return None if torch.equal(found, sample) else "a sample differs from the reference"


def _quantize_bitsandbytes(weight: Tensor) -> NF4Weight:
    from bitsandbytes.functional import quantize_4bit

    n, k = weight.shape
    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return NF4Weight(packed.view(n, k // 2), state.absmax.float().view(n, k // BLOCK))


def quantize_reference(weight: Tensor) -> NF4Weight:
    """The naive quantizer: scale each block of 64 to -1..1 and take the nearest level. Plain torch, any device."""
    import torch

    n, k = weight.shape
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(n, k // BLOCK, device=weight.device)
    step = max(1, CHUNK // k)
    for rows, pairs, scales in zip(*(part.split(step) for part in (weight, packed, absmax)), strict=True):
        blocks = rows.float().reshape(len(rows), -1, BLOCK)
        torch.amax(blocks.abs(), dim=2, out=scales)
        scaled = blocks * torch.where(scales > 0, 1 / scales, 0.0)[..., None]
        codes = torch.bucketize(scaled, between, out_int32=True).to(torch.uint8).view(len(rows), k)
        pairs.copy_((codes[:, ::2] << 4) | codes[:, 1::2])
    return NF4Weight(packed, absmax)


@cache
def pairs_of(device: torch.device) -> Tensor:
    """fp32 `[256, 2]`: the two levels of a byte. Made once, since it comes from the host, which a capture forbids."""
    import torch

    from .utils.inference_mode import inference_mode

    with inference_mode(False):
        levels = torch.tensor(LEVELS)
        byte = torch.arange(256)
        return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).to(device)


def dequantize(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`[N, K]` in `dtype`: level times scale, rounded once. Plain torch, any device.

    Written into `out`, of that shape and type, if given. Allocates at most `DEQUANTIZE_BYTES` besides.
    """
    import torch

    n, k = weight.shape
    device = weight.packed.device
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=device)
    pairs, step = pairs_of(device), max(1, CHUNK // k)
    for packed, absmax, rows in zip(*(part.split(step) for part in (weight.packed, weight.absmax, out)), strict=True):
        values = torch.nn.functional.embedding(packed.int(), pairs).view(-1, k // BLOCK, BLOCK)
        rows.copy_(values.mul_(absmax[..., None]).view(-1, k))
        del values  # before the next chunk is made
    return out
