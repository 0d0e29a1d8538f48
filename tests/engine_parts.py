"""The one door into an engine, for tests of a single layer: the model's modules, the memory, the encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vortex_core import Engine
    from vortex_core.runtime.painter import Painter


def painter_of(engine: Engine) -> Painter:
    """What the engine's jobs are given. Its `model`, `memory` and `conditioner` are public there."""
    return engine._loaded()


def forget_prompts(engine: Engine) -> None:
    """The next picture encodes its prompt, whatever was drawn before."""
    painter_of(engine).conditioner._cache.clear()
