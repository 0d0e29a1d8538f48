"""LoRAs by the names that Vortex LoRA shows: the list, what a name stands for, and whether a model can use it."""

from __future__ import annotations

from pathlib import Path

from ..vortex_core.errors import VortexCheckpointError, VortexInputError, quoted
from ..vortex_core.flux1.spec import ModelSpec
from . import files, models
from .types import RELEASED, Lora

BUNDLED = "tiny-outlines"


def bundled() -> Path | None:
    """The bundled miniature's LoRA, where this copy of Vortex has it."""
    from ..vortex_core.checkpoint.bundle import TINY

    path = TINY.parent / f"{BUNDLED}-lora.safetensors"
    return path if path.is_file() else None


def available() -> list[str]:
    """Names of the LoRAs that are found, of whatever model, the bundled one first."""
    return [*([BUNDLED] if bundled() else []), *files.loras()]


def find(name: str, strength: float = 1.0) -> Lora:
    """The LoRA of a name in `available`. Raises `VortexInputError` if there is none, or for a strength out of range.

    Raises `VortexCheckpointError`, with the reason, for a file that may not be read.
    """
    path = bundled() if name == BUNDLED else files.pick(f"{files.LORAS}/{name}")  # the API may send anything
    if path is None:
        raise VortexInputError(
            f"There is no LoRA {quoted(name)} here: it is not in list. Found: {models.some(available())}. Put the file "
            "into models/loras and press R, or choose another in Vortex LoRA."
        )
    return Lora(name, str(path), files.fingerprint(path), strength)


def check(lora: Lora, spec: ModelSpec) -> None:
    """Raise `VortexCheckpointError`, in a sentence, where a model of these sizes cannot use it. Reads headers only."""
    from ..vortex_core.checkpoint.lora_check import check_lora

    check_lora(lora.path, spec)


def check_before(lora: Lora) -> None:
    """The same before a workflow runs: raise where no model can use it that was named lately, nor the released one.

    The host does not tell a node what it is linked to. But it asks the loader first, so the loader's model is among
    them, and most likely it is the latest.
    """
    reasons = []
    for spec in (*models.known, RELEASED):
        try:
            return check(lora, spec)
        except VortexCheckpointError as error:
            reasons.append(error)
    raise reasons[0]
