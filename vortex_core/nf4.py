"""The NF4 format: 16 levels of a normal distribution, one fp32 scale for each 64 values.

`packed` is uint8 `[N, K/2]`, row-major, the first value of a pair in the high nibble; `absmax` is fp32
`[N, K/64]`. That is bitsandbytes' layout (nf4, blocksize 64, no double quantization) with the rows kept visible,
so that matrices can be joined and cut by rows. Level table: QLoRA (Dettmers et al., 2023), appendix E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import VortexCheckpointError

if TYPE_CHECKING:  # whoever looks at headers needs the format alone
    import torch
    from torch import Tensor

BLOCK = 64
CHUNK = 2**21  # values that `dequantize` takes at once
DECODE_BYTES = CHUNK * (4 + 2) + 2**16  # of it: the chunk in fp32, its bytes as int32, and the table
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


def join(weights: Sequence[NF4Weight]) -> NF4Weight:
    """Stack weights by rows, bit for bit: every row of a FLUX matrix is whole blocks, so nothing is re-quantized."""
    import torch

    return NF4Weight(torch.cat([w.packed for w in weights]), torch.cat([w.absmax for w in weights]))


def quantize(weight: Tensor, name: str = "weight") -> NF4Weight:
    """Quantize `[N, K]` (bf16, fp16 or fp32; K divisible by 64) on the device it is on, with bitsandbytes.

    Raises `VortexCheckpointError` if the source holds NaN or infinity: it would pass silently into `absmax`.
    """
    n, k = weight.shape
    if k % BLOCK:
        raise VortexCheckpointError(f"{name} is {n} x {k}; NF4 needs the second size divisible by {BLOCK}.")
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    absmax = state.absmax.float()
    if not bool(torch.isfinite(absmax).all()):
        raise VortexCheckpointError(f"{name} holds NaN or infinite values; the file is damaged. Download it again.")
    return NF4Weight(packed.view(n, k // 2), absmax.view(n, k // BLOCK))


def quantize_reference(weight: Tensor) -> NF4Weight:
    """The naive quantizer: scale each block of 64 to -1..1 and take the nearest level. Oracle for `quantize`."""
    import torch

    n, k = weight.shape
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * torch.where(absmax > 0, 1 / absmax, 0.0)[:, None]
    levels = torch.tensor(LEVELS, device=weight.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(n, k)
    return NF4Weight((codes[:, ::2] << 4) | codes[:, 1::2], absmax.view(n, k // BLOCK))


def dequantize(weight: NF4Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`[N, K]` in `dtype`: level times scale, rounded once. Plain torch, any device.

    Written into `out`, of that shape and type, if it is given; besides it, `DECODE_BYTES` are taken at most.
    """
    import torch

    n, k = weight.shape
    device = weight.packed.device
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=device)
    levels = torch.tensor(LEVELS, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)  # [256, 2]: a byte is two values
    step = max(1, CHUNK // k)
    for packed, absmax, rows in zip(*(part.split(step) for part in (weight.packed, weight.absmax, out)), strict=True):
        values = torch.nn.functional.embedding(packed.int(), pairs).view(-1, k // BLOCK, BLOCK)
        rows.copy_(values.mul_(absmax[..., None]).view(-1, k))
        del values  # or it would be there still when the next chunk is made
    return out
