"""Models by the names the loader shows: the list, and the handle that a name stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..vortex_core.errors import VortexCheckpointError, VortexInputError, quoted
from ..vortex_core.flux1.spec import ModelSpec
from . import files
from .types import Model

BUNDLED = "tiny-schnell"
OWN = "automatic"
SHOWN = 10  # names that an error lists
KNOWN = 16
known: tuple[ModelSpec, ...] = ()  # the sizes of the models that were named last; never changed in place


def available() -> list[str]:
    """Names of the models that are found, the bundled miniature first."""
    return [BUNDLED, *files.models()]


def choices(part: str) -> list[str]:
    """What the loader offers for `clip`, `t5` or `vae`."""
    return [OWN, *files.parts(part)]


def find(name: str, vram_budget: float, mode: str, *, clip: str = OWN, t5: str = OWN, vae: str = OWN) -> Model:
    """The handle of a model in `available`, with files for the parts that it lacks.

    `clip`, `t5` and `vae` are `choices`. `OWN` stands for the model's own part, else for the one file that fits. Raises
    `VortexInputError` if a file or a part is missing. Raises `VortexCheckpointError`, with the reason, for a file that
    is another model, damaged, or may not be read.
    """
    global known
    from ..vortex_core.checkpoint.bundle import TINY, WORDS

    path = TINY if name == BUNDLED else files.pick(str(name))  # the API may send anything
    if path is None:
        raise VortexInputError(
            f"There is no model {quoted(name)} here: it is not in list. Found: {some(available())}. Put "
            "FLUX.1-schnell into models/diffusion_models or models/checkpoints (a file) or models/vortex (a whole "
            "folder), and press R to refresh the list."
        )
    fingerprint = files.fingerprint(path)
    held = files.held(path) or files.look(path)
    if "transformer" not in held:
        raise VortexCheckpointError(
            f"{quoted(name)} does not hold FLUX.1-schnell's transformer, only {', '.join(WORDS[p] for p in held)}. "
            "Choose another model.",
            path=str(path),
        )
    chosen = {"clip": clip, "t5": t5, "vae": vae}
    parts = {part: file for part, choice in chosen.items() if (file := _part(name, held, part, choice)) is not None}
    if parts:
        prints = (fingerprint, *(f"{part} {files.fingerprint(file)}" for part, file in parts.items()))
        fingerprint = hashlib.sha256("\n".join(prints).encode()).hexdigest()[:16]
    spec = _spec(held, parts)
    known = (spec, *(other for other in known if other != spec))[:KNOWN]
    return Model(name, str(path), fingerprint, vram_budget, mode, tuple(parts.items()), spec)


def _spec(held: Mapping[str, Any], parts: Mapping[str, Path]) -> ModelSpec:
    """The sizes of a model that holds `held`, with these files for other parts."""
    others = {part: (files.held(file) or files.look(file))[part] for part, file in parts.items()}
    found = {**held, **others}
    return ModelSpec(found["transformer"], found["vae"], found["clip"], found["t5"])


def _part(name: str, held: Mapping[str, Any], part: str, choice: str) -> Path | None:
    """The file for a part of a model that holds `held`; None for its own."""
    from ..vortex_core.checkpoint.bundle import WORDS, wanted_width, width

    if choice == OWN and part in held:
        return None
    folder = f"models/{files.PARTS[part]}"
    if choice != OWN:
        picked = files.pick(f"{files.PARTS[part]}/{choice}")
        if picked is None:
            raise VortexInputError(
                f"There is no file {quoted(choice)} with {WORDS[part]} in {folder}: it is not in list. "
                f"Found: {some(files.parts(part))}."
            )
        if part not in (files.held(picked) or files.look(picked)):
            raise VortexCheckpointError(f"{quoted(choice)} does not hold {WORDS[part]}.", path=str(picked))
        return picked
    found = files.parts(part, patient=True)
    wanted = wanted_width(part, held["transformer"])
    fitting = [other for other, path in found.items() if width(part, files.held(path)[part]) == wanted]
    if len(fitting) == 1:
        return found[fitting[0]]
    remedy = (
        f"{some(fitting)} would do: choose one of them in the loader."
        if fitting
        else f"Put it into {folder} and press R."
    )
    raise VortexInputError(f"{quoted(name)} does not hold {WORDS[part]}. {remedy}")


def some(names: Iterable[str]) -> str:
    """The first names of a long list, to be read."""
    shown = list(islice(names, SHOWN + 1))
    return ", ".join(shown[:SHOWN]) + (", and more" if len(shown) > SHOWN else "") or "none"
