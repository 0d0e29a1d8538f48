"""NF4 with the low-rank update of LoRAs, in CUDA C: both are added in fp32, and rounded once. compiled.py offers this.

Nothing is allocated, and no launch depends on what factors hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rotation
from .adapter import ROWS, Adapter
from .nvrtc import TYPES, launch
from .scaled_tensor import FP8_MAX, SMALLEST

COLUMNS, THREADS = 128, 128  # of a block
VALUES, EIGHT_BITS, LARGEST = range(3)  # what a kernel writes; in adapted.cu, too


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None, adapter: Adapter) -> None:
    """See `reference.dequantize`. All contiguous."""
    rotated = out.dtype == torch.int8
    what = EIGHT_BITS if out.dtype.itemsize == 1 else VALUES
    _launch(packed, absmax, row_scale, out, adapter, what, 1.0, rotated=rotated)


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter) -> None:
    """See `reference.row_scales`. Blocks along a row agree on the largest value in `out`."""
    rotated = dtype == torch.int8
    unit = 1 / (rotation.INT8_MAX if rotated else FP8_MAX)
    out.fill_(SMALLEST * unit)
    _launch(packed, absmax, None, out, adapter, LARGEST, unit, rotated=rotated)


def _launch(
    packed: Tensor, absmax: Tensor, row_scale: Tensor | None, out: Tensor, adapter: Adapter, what: int, unit: float,
    *, rotated: bool,
) -> None:  # fmt: skip
    n, k = len(packed), packed.shape[1] * 2
    width = rotation.block(k)
    turn = (int(width != rotation.HALF), width**-0.5) if rotated else ()
    dtype = out.dtype if what == VALUES else torch.bfloat16
    launch(
        "adapted_rotated" if rotated else "adapted", (-(-k // COLUMNS), -(-n // ROWS)), THREADS, out.device, dtype,
        packed, absmax, row_scale, out, *adapter, adapter.up.shape[1], TYPES[adapter.up.dtype], n, k, what, unit, *turn,
        module="adapted",
    )  # fmt: skip
