"""The alphas that a LoRA file does not hold as tensors: in diffusers' metadata, or in PEFT's config beside it.

Without any, alpha is the rank, as in diffusers and ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from ..errors import VortexCheckpointError, quoted
from ..storage.files import Raw
from ..storage.strict_json import unambiguous
from .config import read_config

DIFFUSERS = "lora_adapter_metadata"  # JSON in a file's metadata
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST = 1e9  # of an alpha; a model's are ranks
PARTS = ("transformer.", "text_encoder.", "text_encoder_2.")


@dataclass(frozen=True, slots=True)
class Said:
    """What a config says of one part: its alpha, others by the end of a module's name, and whether by rank's root.

    `rank` is for modules whose factors do not tell one: PEFT scales these LoKr, too.
    """

    alpha: float | None
    pattern: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    rank: float | None = None

    def scale(self, stem: str, rank: int | None) -> float:
        """What the product of factors is multiplied with."""
        named = (value for end, value in self.pattern.items() if stem == end or stem.endswith(f".{end}"))
        alpha, by = next(named, self.alpha), rank or self.rank
        return 1.0 if alpha is None or not by else alpha / (sqrt(by) if self.by_root else by)


@dataclass(frozen=True, slots=True)
class Alphas:
    """Alphas by the beginning of names; the empty one stands for all names."""

    said: Mapping[str, Said] = field(default_factory=dict)

    def scale(self, stem: str, rank: int | None) -> float:
        """The scale of a module whose alpha is no tensor in the file; `rank` of its factors, where they tell."""
        return next((said.scale(stem, rank) for start, said in self.said.items() if stem.startswith(start)), 1.0)


def read_alphas(raw: Raw) -> Alphas:
    """The alphas beside a file's tensors. Raises `VortexCheckpointError` where they are no finite numbers."""
    if DIFFUSERS in raw.metadata:
        try:
            table = unambiguous(raw.metadata[DIFFUSERS].encode())
        except (ValueError, RecursionError) as error:
            raise _error(raw, error) from error
        if not isinstance(table, dict):
            raise _error(raw, "it is no table")
        return _by_part(raw, table)
    beside = [path.parent / PEFT_CONFIG for path in raw.files if path.name == PEFT_FILE]
    if beside and beside[0].is_file():
        return Alphas({"": _said(raw, read_config(Path(beside[0])))})
    return Alphas()


def _by_part(raw: Raw, table: Mapping[str, Any]) -> Alphas:
    """diffusers' table: keys have the part's name in front, but for a transformer that was saved alone."""
    found = {}
    for part in (*PARTS, ""):
        own = {key.removeprefix(part): value for key, value in table.items() if key.startswith(part)}
        if "lora_alpha" in own or "alpha" in own:
            found[part] = _said(raw, own)
    return Alphas(found)


def _said(raw: Raw, config: Mapping[str, Any]) -> Said:
    alpha = config.get("lora_alpha", config.get("alpha"))
    pattern = config.get("alpha_pattern") or {}
    rank = config.get("r")
    given = [value for value in (alpha, rank) if value is not None]
    if not isinstance(pattern, dict) or not all(_is_number(value) for value in (*pattern.values(), *given)):
        raise _error(raw, f"alpha is {quoted(alpha)}, by module {quoted(pattern)}, rank {quoted(rank)}")
    if rank is not None and rank <= 0:
        raise _error(raw, f"rank is {quoted(rank)}")
    return Said(alpha, pattern, config.get("use_rslora") is True, rank)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # type: ignore[arg-type]


def _error(raw: Raw, what: object) -> VortexCheckpointError:
    return VortexCheckpointError(
        f"{raw.where}: its description of the LoRA ({DIFFUSERS} or {PEFT_CONFIG}) cannot be used: {what}.",
        path=raw.where,
    )
