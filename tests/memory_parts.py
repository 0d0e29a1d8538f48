"""An engine on the CPU whose memory is counted as if on a card, and what its pictures need.

What would be reserved is what the engine has, by its own account.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from engine_parts import painter_of
from torch import Tensor

from vortex_core import Engine, MemoryPressureWarning
from vortex_core.memory.planner import BLOCKS, MemoryRequirements, smallest_budget

GB = 1e9
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PROMPT = "a green ring"
SIZE = {"height": 64, "width": 96}
AMPLE = 2.0  # GB, with room for the miniature and everything


def asked(engine: Engine, batch: int = 1) -> MemoryRequirements:
    return painter_of(engine).model.requirements(*SIZE.values(), batch)


def narrow(engine: Engine, batch: int = 1) -> None:
    """Give the engine the smallest budget that draws `SIZE`."""
    painter_of(engine).memory.budget = smallest_budget(painter_of(engine).model.sizes, asked(engine, batch))


def draw(engine: Engine, seed: int = 1, **options: Any) -> Tensor:
    return engine.generate(PROMPT, seed=seed, **{**SIZE, "steps": 2, **options})


def streams(engine: Engine) -> bool:
    """Whether blocks stream."""
    return any(group.part == BLOCKS and group.name in engine.plan.streamed for group in engine.plan.groups)


def nearly_full(expected: bool) -> AbstractContextManager[Any]:
    return pytest.warns(MemoryPressureWarning, match="GB left at the peak") if expected else nullcontext()
