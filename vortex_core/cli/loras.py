"""LoRAs as the command names them, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..flux1.spec import ModelSpec


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`. What follows a colon and is no number belongs to the file, as in `C:\\loras\\a`."""
    name, colon, last = text.rpartition(":")
    try:
        strength = float(last) if colon else 1.0
    except ValueError:
        name, colon, strength = text, "", 1.0
    from ..runtime.lora_files import check_pair

    return check_pair((name if colon else text, strength))


def check_loras(loras: Sequence[tuple[Path, float]], model: str | Path, **parts: object) -> None:
    """Raise `VortexCheckpointError` for a file that does not fit `model`. Reads headers only."""
    from ..checkpoint.bundle import open_bundle
    from ..checkpoint.lora_check import check_lora

    parts.pop("cache_dir", None)
    spec: ModelSpec = open_bundle(model, **parts).spec  # type: ignore[arg-type]
    for path, _ in loras:
        check_lora(path, spec)
