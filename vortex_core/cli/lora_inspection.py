"""What a LoRA file holds, from its header alone and without torch: the words and figures of `vortex inspect LORA`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.bundle import SUBFOLDERS, TINY, describe, find_parts
from ..checkpoint.lora_header import LoraHeader, header_of, open_source
from ..checkpoint.lora_kinds import acts_at_prompt_time, base_of, kind_of
from ..checkpoint.lora_layers import BIAS, NORM, Layer
from ..checkpoint.lora_roles import is_lora
from ..errors import VortexCheckpointError
from ..flux1.spec import ModelSpec
from ..storage.files import SAFETENSORS
from ..utils.paths import expanded
from .terminal import grid, out

RELEASED, BUNDLED = "FLUX.1", "tiny-schnell"
PARTS = ("transformer", "t5", "clip")
SHOWN = 6  # ranks, at most
BYTES = 2  # of a value on the card
WHOLE = (
    "it changes a 4-bit weight as a whole (large LoHa or LoKr, DoRA of columns, OFT, diff), not by a low-rank update"
)


@dataclass(frozen=True, slots=True)
class LoraFound:
    """What a LoRA changes in one part: matrices by what they become, biases and norms, and its size in the file."""

    part: str
    matrices: int
    updates: int
    whole: int
    biases: int
    norms: int
    prompt_time: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class LoraInspection:
    """A LoRA as found on disk. `refused` and `ignored` count tensors, or matrices, by reason.

    `base` is the model that it was trained on, where the file says so; `fits` the one whose sizes it has. `factors`:
    bytes that its updates take on the card in 16 bits.
    """

    path: Path
    kind: str
    base: str | None
    fits: str
    ranks: tuple[int, ...]
    found: tuple[LoraFound, ...]
    refused: Mapping[str, int]
    ignored: Mapping[str, int]
    factors: int
    nbytes: int


def inspect_lora(path: str | Path) -> LoraInspection | None:
    """Look at a LoRA without reading its tensors; None where `path` is no LoRA file.

    Raises `VortexCheckpointError` for one that is damaged, another model's, or not understood.
    """
    where = expanded(path)
    if where.suffix.lower() not in SAFETENSORS or not where.is_file():
        return None
    raw = open_source(where)
    if not is_lora(raw.names()):
        return None
    fits, header = RELEASED, None
    try:
        header = header_of(raw, ModelSpec())
    except VortexCheckpointError as error:
        try:
            fits, header = BUNDLED, header_of(raw, _bundled())
        except VortexCheckpointError:
            raise error from None
    return LoraInspection(
        path=where,
        kind=kind_of(header),
        base=base_of(header),
        fits=fits,
        ranks=header.ranks,
        found=tuple(_found(header, part) for part in PARTS if any(one.place.part == part for one in header.layers)),
        refused=dict(Counter(header.refused.values())) | ({WHOLE: len(header.whole)} if header.whole else {}),
        ignored=dict(Counter(header.ignored.values())),
        factors=_factors(header),
        nbytes=header.nbytes,
    )


def _bundled() -> ModelSpec:
    parts, configs = find_parts(TINY, {})
    made = {kind: describe(kind, parts[kind], configs.get(kind)) for kind in SUBFOLDERS}
    return ModelSpec(made["transformer"], made["vae"], made["clip"], made["t5"])


def _found(header: LoraHeader, part: str) -> LoraFound:
    own = [one for one in header.layers if one.place.part == part]
    changed = {one.place.module: one for one in own if one.form not in (NORM, BIAS)}
    whole = {one.place.module for one in own if one.copied}
    return LoraFound(
        part=part,
        matrices=len(changed),
        updates=len(changed.keys() - whole),
        whole=len(whole),
        biases=len({one.place.module for one in own if "diff_b" in one.keys or "up_bias" in one.keys}),
        norms=len({one.place.module for one in own if one.form == NORM}),
        prompt_time=sum(acts_at_prompt_time(part, module) for module in changed),
        nbytes=sum(_nbytes(header, one) for one in own),
    )


def _nbytes(header: LoraHeader, one: Layer) -> int:
    return sum(header.raw.nbytes(key) for key in one.keys.values())


def _factors(header: LoraHeader) -> int:
    whole = {(one.place.part, one.place.module) for one in header.layers if one.copied}
    low = [one for one in header.layers if (one.place.part, one.place.module) not in whole]
    return sum(BYTES * one.product * (one.place.count + one.place.shape[-1]) for one in low)


def show(seen: LoraInspection) -> None:
    """Print what was seen: a table of parts, then sentences."""
    table = grid("part", "matrices", "updates", "whole", "biases", "norms", "per prompt", "in the file")
    for one in seen.found:
        counts = (one.matrices, one.updates, one.whole, one.biases, one.norms, one.prompt_time)
        table.add_row(one.part, *map(str, counts), f"{one.nbytes / 1e6:.1f} MB")
    if seen.found:
        out().print(table)
    ranks = ", ".join(map(str, seen.ranks[:SHOWN])) + (", ..." if len(seen.ranks) > SHOWN else "")
    out().say(f"LoRA: {seen.kind}" + (f"; rank {ranks}" if ranks else "") + f"; {seen.nbytes / 1e6:.1f} MB")
    trained = "" if seen.base is None else f"; trained on {seen.base}"
    sizes = "FLUX.1-schnell and FLUX.1-dev, which have the same sizes" if seen.fits == RELEASED else seen.fits
    out().say(f"It fits {sizes}{trained}")
    if seen.factors:
        out().say(f"{seen.factors / 1e6:.1f} MB of updates on the GPU, in 16 bits")
    for words, style, reasons in (("refused", "yellow", seen.refused), ("no effect", "green", seen.ignored)):
        for why, count in reasons.items():
            out().say((words, style), f": {why} ({count} in the file)")
