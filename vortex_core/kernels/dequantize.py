"""NF4 to bf16, or to fp8 scaled by row, near the speed of memory. To int8, and with LoRAs: `weights`.

A thread takes 32-bit words of eight codes. The 16 levels lie in 16 banks of shared memory, so that lookups never
conflict. Level times scale is fp32 and rounded once, so bf16 is equal to bitsandbytes', bit for bit.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nf4 import LEVELS
from . import reference, weights
from .adapter import Adapter
from .launch import early, follow

WORDS = 512  # of a program; each is eight values
WARPS = 4


@triton.jit
def _dequantize(
    packed, absmax, row_scale, levels, out, words,
    WORDS_A_ROW: tl.constexpr, SCALED: tl.constexpr, WORDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    levels = tl.load(levels + tl.arange(0, 16))
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = word < words
    codes = tl.load(packed + word, mask=mask, other=0)
    scale = tl.load(absmax + word // 8, mask=mask, other=0.0)
    if SCALED:
        scale /= tl.load(row_scale + word // WORDS_A_ROW, mask=mask, other=1.0)
    # bytes are little endian and the first value of a byte is its high nibble: 4, 0, 12, 8, ...
    shift = (tl.arange(0, 8) ^ 1) * 4
    code = (codes[:, None] >> shift[None, :]) & 15
    value = tl.gather(levels, tl.reshape(code, [WORDS * 8]), 0)
    value = tl.reshape(value, [WORDS, 8]) * scale[:, None]
    target = out + word.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    follow(EARLY)  # only now: what is read before, weights, was there already
    tl.store(target, value.to(out.dtype.element_ty), mask=mask[:, None])


def dequantize(
    packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None = None, adapter: Adapter | None = None
) -> None:
    """See `reference.dequantize`. All contiguous; K is a multiple of 64."""
    if out.dtype == torch.int8 or weights.adds(adapter):
        weights.dequantize(packed, absmax, out, row_scale, adapter)
        return
    words = packed.numel() // 4
    _dequantize[(triton.cdiv(words, WORDS),)](
        packed.view(torch.int32), absmax, row_scale, _levels(packed.device), out, words,
        WORDS_A_ROW=1 if row_scale is None else packed.shape[1] // 4, SCALED=row_scale is not None, WORDS=WORDS,
        num_warps=WARPS, **early(out),
    )  # fmt: skip
    if adapter is not None:
        adapter.add_to(out)


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None) -> None:
    """See `reference.row_scales`, which is used for fp8: there the scales of blocks tell."""
    if adapter is not None or dtype == torch.int8:
        weights.row_scales(packed, absmax, out, dtype, adapter)
    else:
        reference.row_scales(packed, absmax, out, dtype)


@cache
def _levels(device: torch.device) -> Tensor:
    """NF4's, fp32 `[16]`."""
    return torch.tensor(LEVELS, device=device)
