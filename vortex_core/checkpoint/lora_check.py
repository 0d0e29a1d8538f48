"""Whether a LoRA can be used, before anything of it is read but its header."""

from __future__ import annotations

from pathlib import Path

from ..errors import VortexCheckpointError, quoted
from ..flux1.spec import ModelSpec
from ..nf4 import UNQUANTIZED
from .lora_header import open_lora


def check_lora(path: str | Path, spec: ModelSpec) -> None:
    """Raise `VortexCheckpointError`, in a sentence, for a LoRA that an NF4 model of these sizes cannot draw with."""
    header = open_lora(path, spec)
    if header.refused:
        key, why = next(iter(header.refused.items()))
        more = f" ({len(header.refused)} such tensors)" if len(header.refused) > 1 else ""
        raise VortexCheckpointError(f"{header.where} cannot be used: {quoted(key)}: {why}{more}.", path=header.where)
    places = [one.place for one in header.layers if one.copied]
    # runtime/loras.py says the same of what was read; CLIP is not in 4 bits
    whole = sorted({p.module for p in places if p.part != "clip" and not p.module.startswith(UNQUANTIZED)})
    if whole:
        raise VortexCheckpointError(
            f"{header.where} changes {len(whole)} weights as a whole, such as {whole[0]}: that is no low-rank update, "
            "and cannot be added to 4-bit weights.",
            path=header.where,
        )
