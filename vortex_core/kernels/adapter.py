"""Low-rank updates of a weight, as decoding adds them: the factors of one or several LoRAs, side by side.

The rows of a fused matrix (q, k, v, MLP) may come from updates of their own, so `down` has parts, and rows say which is
theirs. Strengths are apart from factors: another strength is a few bytes, and changes no address.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..nf4 import BLOCK

ROWS = 64  # that share a part
LEAST = 16  # ranks that are added at once
AT_ONCE = 2**20  # values of each factor that `add_to` takes at once
ADD_BYTES = AT_ONCE * (4 + 4) + 2**20  # that it allocates at most: both in fp32, and which rows are whose


class Adapter(NamedTuple):
    """Row n of a weight `[N, K]` gets the sum over r of `scale[p, r] * up[n, r] * down[p, r]`, p its part.

    `up` `[N, R]`, R a multiple of 16; `down` `[P, R, K]` as `arranged` puts it; `part` int32 `[N / 64]`; `scale` fp32
    `[P, R]`: strengths.
    """

    up: Tensor
    down: Tensor
    part: Tensor
    scale: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """The update of some rows, fp32 `[rows, K]`, in plain torch."""
        found, down = [], natural(self.down)
        for first in range(start - start % ROWS, stop, ROWS):
            last = min(first + ROWS, stop)
            part = int(self.part[first // ROWS])
            up = self.up[max(first, start) : last].float() * self.scale[part]
            found.append(up @ down[part].float())
        return torch.cat(found)

    def add_to(self, weight: Tensor) -> None:
        """Add the update to a weight in 16 or 32 bits, in place; rounded once more.

        It waits for no card, and allocates at most `ADD_BYTES`. The factors of all parts are laid side by side, with
        zeros for rows of other parts: so one product adds them, and nobody has to know where a part begins.
        """
        (n, k), (parts, ranks, _), (dtype, device) = weight.shape, self.down.shape, (weight.dtype, weight.device)
        step = max(1, AT_ONCE // (parts * ranks))
        wide = max(BLOCK, step // BLOCK * BLOCK)
        own = self.part[:, None] == torch.arange(parts, device=device)
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            group = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device) // ROWS
            left = own.index_select(0, group)[:, :, None] * self.scale
            left = left.mul_(self.up[rows, None]).flatten(1).to(dtype)
            for start in range(0, k, wide):
                columns = slice(start, start + wide)
                right = natural(self.down, columns, dtype).flatten(0, 1)
                weight[rows, columns].addmm_(left, right)
                del right  # before the next is made


# Of `down`, 16 ranks and 64 columns lie together, in the order in which tensor cores take them: a lane's are one load.
# Ranks are 8 h + 2 t + e and columns 8 g + 2 k + i; their order is k, g, t, h, i, e.
_SPLIT = (2, 4, 2), (8, 4, 2)  # h, t, e; g, k, i
_ORDER = (0, 1, 5, 7, 6, 3, 2, 8, 4)
_BACK = (0, 1, 6, 5, 8, 2, 4, 3, 7)


def arranged(down: Tensor) -> Tensor:
    """A factor `[P, R, K]` in the order of `Adapter.down`, of the same shape."""
    parts, ranks, k = down.shape
    split = down.view(parts, ranks // LEAST, *_SPLIT[0], k // BLOCK, *_SPLIT[1])
    return split.permute(_ORDER).reshape(down.shape)


def natural(down: Tensor, columns: slice = slice(None), dtype: torch.dtype | None = None) -> Tensor:
    """Whole blocks of columns of an `Adapter.down`, in the order of `[P, R, K]`; a copy, in `dtype` if given."""
    parts, ranks, k = down.shape
    groups, blocks = ranks // LEAST, slice(*(edge and -(-edge // BLOCK) for edge in (columns.start, columns.stop)))
    split = down.view(parts, groups, k // BLOCK, 4, 8, 4, 2, 2, 2)[:, :, blocks]
    found = down.new_empty((parts, ranks, split.shape[2] * BLOCK), dtype=dtype)
    found.view(parts, groups, *_SPLIT[0], split.shape[2], *_SPLIT[1]).copy_(split.permute(_BACK))
    return found
