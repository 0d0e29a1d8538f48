"""Low-rank updates of a weight, as decoding adds them: the factors of one or several LoRAs, side by side.

The rows of a fused matrix (q, k, v, MLP) may come from updates of their own, so `down` has parts, and rows say which is
theirs. Strengths are apart from factors: another strength is a few bytes, and changes no address.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 64  # that share a part
LEAST = 16  # ranks that are added at once


class Adapter(NamedTuple):
    """Row n of a weight `[N, K]` gets the sum over r of `scale[p, r] * up[n, r] * down[p, r]`, p its part.

    `up` `[N, R]`, `down` `[P, R, K]`, R a multiple of 16; `part` int32 `[N / 64]`; `scale` fp32 `[P, R]`: strengths.
    For products in int8 `down` is rotated, as operands are.
    """

    up: Tensor
    down: Tensor
    part: Tensor
    scale: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """The update of some rows, fp32 `[rows, K]`, in plain torch."""
        found = []
        for first in range(start - start % ROWS, stop, ROWS):
            last = min(first + ROWS, stop)
            part = int(self.part[first // ROWS])
            up = self.up[max(first, start) : last].float() * self.scale[part]
            found.append(up @ self.down[part].float())
        return torch.cat(found)

    def add_to(self, weight: Tensor) -> None:
        """Add the update to a weight in 16 or 32 bits, in place; rounded once more, and without waiting for a card."""
        for part, (down, scale) in enumerate(zip(self.down, self.scale, strict=True)):
            # rows of other parts add zeros
            mine = (self.part == part).repeat_interleave(ROWS)[: len(weight), None]
            weight.addmm_((self.up * scale * mine).to(weight.dtype), down.to(weight.dtype))
