"""What a file or folder is, from headers alone: the words and figures behind `vortex inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint.bundle import SUBFOLDERS, WORDS, describe, find_parts
from .checkpoint.dialect import Part
from .checkpoint.materialize import check, is_quantized
from .checkpoint.tokenizer import locate_tokenizers
from .conditioning import Modulation
from .errors import VortexCheckpointError
from .nf4 import BLOCK
from .paths import expanded
from .transformer import Transformer

NF4_BYTES = 0.5 + 4 / BLOCK  # a value, with its share of the scale


@dataclass(frozen=True, slots=True)
class Found:
    """One part of a model: what it is, in words, and its size in the file."""

    kind: str
    words: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model as found on disk. `missing` says in words what must be given besides; `placement` in bytes."""

    path: Path
    found: tuple[Found, ...]
    missing: tuple[str, ...]
    placement: Mapping[str, int]

    @property
    def resident(self) -> int:
        """Bytes that stay on the GPU between pictures."""
        return sum(size for what, size in self.placement.items() if "host" not in what)


def inspect(path: str | Path, others: Mapping[str, str | Path | None] | None = None) -> Inspection:
    """Look at a model without reading its weights.

    Raises `VortexCheckpointError` where there is nothing of a FLUX.1-schnell model at `path`, or an incomplete one.
    """
    where = expanded(path)
    parts, configs = find_parts(where, others or {})
    if not parts:
        raise VortexCheckpointError(
            f"{where} holds no part of FLUX.1-schnell that Vortex knows (transformer, text encoders or VAE).",
            path=str(where),
        )
    found = tuple(
        Found(kind, part.words, sum(1 for _ in part.stored.names()), part.nbytes) for kind, part in parts.items()
    )
    missing = [WORDS[kind] for kind in SUBFOLDERS if kind not in parts]
    missing += [
        f"{encoder}'s tokenizer (`vortex fetch tokenizers` downloads it)"
        for encoder, place in locate_tokenizers(where if where.is_dir() else None).items()
        if place is None
    ]
    return Inspection(where, found, tuple(missing), dict(_placement(parts, configs)))


def _placement(parts: Mapping[str, Part], configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    if "transformer" not in parts:
        return
    tensors = parts["transformer"].tensors
    spec = describe("transformer", parts["transformer"], configs.get("transformer"))
    with torch.device("meta"):
        step_time, modulation = Transformer(spec), Modulation(spec)
    for half in (step_time, modulation):
        check(half, tensors, scales=False)
    yield "step-time weights, on the GPU", nf4_size(step_time)
    yield (
        "a decoded weight, on the GPU",
        2 * max(part.weight.numel() for part in step_time.modules() if isinstance(part, nn.Linear)),
    )
    yield "modulation, in host memory", nf4_size(modulation)
    if "t5" in parts:
        stored = parts["t5"].stored
        tables = ("shared.", "encoder.embed_tokens.", "token_embd.")
        values = sum(_numel(stored.shape(name)) for name in stored.names() if not name.startswith(tables))
        yield "T5, in host memory", int(values * NF4_BYTES)


def nf4_size(module: nn.Module) -> int:
    """Bytes of a module on `meta` once its linears are NF4 and the rest is bf16."""
    packed = {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and is_quantized(part, name)
    }
    return int(sum(p.numel() * (NF4_BYTES if name in packed else 2) for name, p in module.named_parameters()))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
