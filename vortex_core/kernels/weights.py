"""NF4 to rotated int8, and with the low-rank update of LoRAs to whatever products take, in CUDA C (cuda/weights.cu).

With Triton, too, these are the kernels. Tensor cores add the update and rotate, and their results have to stay in the
registers where they lie: Triton moves them through shared memory, which took two to four times as long.

For 8 bits arithmetic is in fp16, with a weight's largest value at the end of the range: that is some 30 times as fine
as a step of int8. Nothing is allocated, and no launch depends on what factors hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rotation
from .adapter import LEAST, Adapter
from .card import card
from .nvrtc import launch
from .scaled_tensor import FP8, FP8_MAX, SMALLEST

THREADS = 128  # of a block; this and what follows is in weights.cu, too
ROWS = 16 * THREADS // 32  # of a block
COLUMNS = 128  # that a block takes at once
HELD = 8  # groups of ranks whose factors lie in shared memory
LEFT_BYTES = ROWS * LEAST * 2  # of one group
AT_ONCE = 6  # blocks of a multiprocessor
MOST_STEPS = 8  # of a block along its rows


def dequantize(
    packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None, adapter: Adapter | None = None
) -> None:
    """See `reference.dequantize`: to int8, or with an adapter whose factors are fp16. All contiguous."""
    what = {torch.int8: "int8", FP8: "fp8"}.get(out.dtype, "values")
    unit = rotation.block(packed.shape[1] * 2) ** 0.5 if what == "int8" else 1.0
    _launch(what, packed, absmax, row_scale, out, adapter, unit)


def row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Adapter | None = None) -> None:
    """See `reference.row_scales`. Blocks along a row agree on the largest value in `out`."""
    rotated = dtype == torch.int8
    unit = rotation.unit(packed.shape[1] * 2) if rotated else 1 / FP8_MAX
    out.fill_(SMALLEST * unit)
    _launch("int8_scales" if rotated else "fp8_scales", packed, absmax, None, out, adapter, unit)


def adds(adapter: Adapter | None) -> bool:
    """Whether it has kernels that add an update: tensor cores take factors in fp16."""
    return adapter is not None and adapter.up.dtype == torch.float16


def _launch(
    what: str, packed: Tensor, absmax: Tensor, row_scale: Tensor | None, out: Tensor, adapter: Adapter | None,
    unit: float,
) -> None:  # fmt: skip
    (n, k), ranks = (len(packed), packed.shape[1] * 2), 0
    factors: tuple[Tensor | None, ...] = (None,) * 4
    kind = "plain"
    if adapter is not None:
        assert adapter.up.dtype == adapter.down.dtype == torch.float16
        factors, ranks = adapter, adapter.up.shape[1]
        kind = "adapted" if ranks <= HELD * LEAST else "many"
    known, dtype = card(out.device), out.dtype if what == "values" else torch.bfloat16
    down, across = -(-n // ROWS), -(-k // COLUMNS)
    steps = _steps(down, across, AT_ONCE * known.processors)
    early = known.early and out.dtype.itemsize == 1  # never what finds row scales: see weights.cu
    launch(
        "weights", (-(-across // steps), down), THREADS, out.device, dtype,
        _aligned(packed), absmax, row_scale, out, *factors, ranks, n, k, steps, int(rotation.block(k) == COLUMNS), unit,
        module=f"{kind}_{what}", early=early,
        shared=min(ranks // LEAST, HELD) * LEFT_BYTES,
    )  # fmt: skip


def _steps(down: int, across: int, at_once: int) -> int:
    """How often a block goes along its rows: each has work before the first, and the last wave may be half empty."""
    return min(range(1, MOST_STEPS + 1), key=lambda steps: -(-down * -(-across // steps) // at_once) * (steps + 1))


def _aligned(x: Tensor) -> Tensor:
    """`x`, for loads of 4 bytes. Weights at work lie so; those that are read may not."""
    return x if x.data_ptr() % 4 == 0 else x.clone()
