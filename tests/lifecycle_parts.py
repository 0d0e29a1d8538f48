"""Small pictures, and faults at every stage of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from vortex_core import Engine
from vortex_core.device import finite_pictures
from vortex_core.flux1 import conditioning, transformer, vae
from vortex_core.memory import offload

PROMPT = "a yellow square"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}


def draw(engine: Engine, seed: int = 1, **options: Any) -> Tensor:
    return engine.generate(PROMPT, seed=seed, **{**SMALL, **options})


STAGES: dict[str, tuple[object, str, int]] = {  # what breaks, and at which call
    "encode": (conditioning.Conditioner, "_table", 1),
    "step 2": (transformer.Transformer, "forward", 2),
    "copy of a streamed block": (offload.CopyStream, "copy", 3),
    "decode": (vae.Decoder, "forward", 1),
    "copy out": (finite_pictures.Verdicts, "check", 1),
}


class Fault:
    """Raises `error` at the nth call of a function, `times` times; else the function does what it does."""

    def __init__(
        self, patch: pytest.MonkeyPatch, stage: str, error: Callable[[], BaseException], times: int = 1
    ) -> None:
        where, name, first = STAGES[stage]
        real, self.calls = getattr(where, name), 0

        def function(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if first <= self.calls < first + times:
                raise error()
            return real(*arguments, **options)

        patch.setattr(where, name, function)
