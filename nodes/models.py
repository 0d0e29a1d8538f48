"""Models by the names the loader shows: the list, and the handle that a name stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import files
from .types import Model

BUNDLED = "tiny-schnell"
OWN = "automatic"


def available() -> list[str]:
    """Names of the models that are found, the bundled miniature first."""
    return [BUNDLED, *files.models()]


def choices(part: str) -> list[str]:
    """What the loader offers for `clip`, `t5` or `vae`."""
    return [OWN, *files.parts(part)]


def find(name: str, vram_budget: float, mode: str, *, clip: str = OWN, t5: str = OWN, vae: str = OWN) -> Model:
    """The handle of a model in `available`, with the parts that it lacks.

    `clip`, `t5` and `vae` are `choices`: `OWN` is the model's own, else the one file that fits. Raises
    `VortexInputError` for any other name and where a part is missing, `VortexCheckpointError` for another model.
    """
    from ..vortex_core.checkpoint.bundle import TINY
    from ..vortex_core.errors import VortexInputError

    found = {BUNDLED: TINY, **files.models()}
    if name not in found:
        raise VortexInputError(
            f"There is no model {name!r} here. Found: {', '.join(found)}. Put FLUX.1-schnell into "
            "models/diffusion_models or models/checkpoints (a file) or models/vortex (a whole folder), and press R to "
            "refresh the list."
        )
    path = found[name]
    fingerprint = files.fingerprint(path)
    held = files.contents(path, fingerprint) or files.look(path)
    if "transformer" not in held:
        raise VortexInputError(f"{name} does not hold FLUX.1-schnell's transformer.")
    chosen = {"clip": clip, "t5": t5, "vae": vae}
    parts = {part: file for part, choice in chosen.items() if (file := _part(name, held, part, choice)) is not None}
    if parts:
        prints = (fingerprint, *(f"{part} {files.fingerprint(file)}" for part, file in parts.items()))
        fingerprint = hashlib.sha256("\n".join(prints).encode()).hexdigest()[:16]
    return Model(name, str(path), fingerprint, vram_budget, mode, tuple(parts.items()))


def _part(name: str, held: Mapping[str, Any], part: str, choice: str) -> Path | None:
    """The file for a part of a model that holds `held`; None for its own."""
    from ..vortex_core.checkpoint.bundle import WORDS, wanted_width, width
    from ..vortex_core.errors import VortexInputError

    if choice == OWN and part in held:
        return None
    found, folder = files.parts(part), f"models/{files.PARTS[part]}"
    if choice in found:
        return found[choice]
    if choice != OWN:
        raise VortexInputError(
            f"There is no file {choice!r} with {WORDS[part]} in {folder}. Found: {', '.join(found) or 'none'}."
        )
    wanted = wanted_width(part, held["transformer"])
    fitting = [other for other, path in found.items() if width(part, files.held(path)[part]) == wanted]
    if len(fitting) == 1:
        return found[fitting[0]]
    remedy = (
        f"{', '.join(fitting)} would do: choose one of them in the loader."
        if fitting
        else f"Put it into {folder} and press R."
    )
    raise VortexInputError(f"{name} does not hold {WORDS[part]}. {remedy}")
