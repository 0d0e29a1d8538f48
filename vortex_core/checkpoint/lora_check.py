"""Whether a LoRA can be used, before anything of it is read but its header."""

from __future__ import annotations

from pathlib import Path

from ..errors import VortexCheckpointError, quoted
from ..flux1.spec import ModelSpec
from .lora_header import open_lora


def check_lora(path: str | Path, spec: ModelSpec) -> None:
    """Raise `VortexCheckpointError`, in a sentence, for a LoRA that a model of these sizes cannot draw with."""
    header = open_lora(path, spec)
    if header.refused:
        key, why = next(iter(header.refused.items()))
        more = f" ({len(header.refused)} such tensors)" if len(header.refused) > 1 else ""
        raise VortexCheckpointError(f"{header.where} cannot be used: {quoted(key)}: {why}{more}.", path=header.where)
