"""What a Vortex NAG node asks of a MODEL's steps, and which rows of a batch it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .nag import OPTION

if TYPE_CHECKING:
    from torch import Tensor

    from ..vortex_core.flux1.nag import Nag

WANTED = 0  # in the host's `cond_or_uncond`


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """Keep away from a text, in host memory: T5's `txt` `[1, N, context]`, and CLIP's `pooled` `[1, vec]`."""

    nag: Nag
    txt: Tensor
    pooled: Tensor


def wish_of(options: Mapping[str, Any]) -> Wish | None:
    """What the step's `transformer_options` ask, or None."""
    return options.get(OPTION)


def is_wanted(options: Mapping[str, Any], row: int, rows: int) -> bool:
    """Whether a row of a batch is of the positive prompt: with CFG, others are of the negative one."""
    kinds = options.get("cond_or_uncond") or [WANTED]
    return bool(kinds[row * len(kinds) // rows] == WANTED)
