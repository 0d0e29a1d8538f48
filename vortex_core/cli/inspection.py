"""What a file or folder holds, from headers alone and without torch: the words and figures of `vortex inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..checkpoint.bundle import SUBFOLDERS, WORDS, describe, find_parts
from ..checkpoint.dialects import Part, depth
from ..checkpoint.key_maps import ENCODER, modulation_shapes, step_shapes
from ..checkpoint.tokenizer import locate_tokenizers
from ..errors import VortexCheckpointError
from ..nf4 import BLOCK, UNQUANTIZED
from ..storage.tensors import check_shapes
from ..utils.paths import expanded

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
    """A model as found on disk. `missing` names, in words, what must be given as well; `placement` is in bytes."""

    path: Path
    found: tuple[Found, ...]
    missing: tuple[str, ...]
    placement: Mapping[str, int]

    @property
    def resident(self) -> int:
        """Bytes that stay on the GPU between pictures."""
        return sum(size for what, size in self.placement.items() if "host" not in what)


def inspect(
    path: str | Path,
    others: Mapping[str, str | Path | None] | None = None,
    tokenizers: str | Path | None = None,
) -> Inspection:
    """Look at a model without reading its weights. `others` and `tokenizers` are further arguments of `Engine.load`.

    Raises `VortexCheckpointError` where `path` holds no part of FLUX.1-schnell, or an incomplete one.
    """
    where = expanded(path)
    parts, configs = find_parts(where, others or {})
    if not parts:
        raise VortexCheckpointError(
            f"{where} holds no part of FLUX.1-schnell that Vortex knows (transformer, text encoders or VAE).",
            path=str(where),
        )
    found = tuple(
        Found(kind, _words(kind, part, configs), sum(1 for _ in part.stored.names()), part.nbytes)
        for kind, part in parts.items()
    )
    missing = [WORDS[kind] for kind in SUBFOLDERS if kind not in parts]
    folder = expanded(tokenizers) if tokenizers is not None else where if where.is_dir() else None
    missing += [
        f"{encoder}'s tokenizer (`vortex fetch tokenizers` downloads it)"
        for encoder, place in locate_tokenizers(folder).items()
        if place is None
    ]
    return Inspection(where, found, tuple(missing), dict(_placement(parts, configs)))


def _words(kind: str, part: Part, configs: Mapping[str, Mapping[str, Any]]) -> str:
    if kind == "vae" and f"{ENCODER}conv_in.weight" not in part.tensors:
        return f"{part.words}, without an encoder"
    if kind != "transformer":
        return part.words
    return f"{part.words}, {depth(describe(kind, part, configs.get(kind)))}"


def _placement(parts: Mapping[str, Part], configs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    if "transformer" not in parts:
        return
    tensors = parts["transformer"].tensors
    spec = describe("transformer", parts["transformer"], configs.get("transformer"))
    step_time, modulation = step_shapes(spec), modulation_shapes(spec)
    for half in (step_time, modulation):
        check_shapes(half, tensors, scales=False)
    yield "step-time weights, on the GPU", nf4_size(step_time)
    yield "a decoded weight, on the GPU", 2 * max(prod(shape) for shape in step_time.values())
    yield "modulation, in host memory", nf4_size(modulation)
    if "t5" in parts:
        stored = parts["t5"].stored
        tables = ("shared.", "encoder.embed_tokens.", "token_embd.")
        values = sum(prod(stored.shape(name)) for name in stored.names() if not name.startswith(tables))
        yield "T5, in host memory", int(values * NF4_BYTES)


def nf4_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of parameters with linears in NF4 and the rest in bf16."""
    return int(
        sum(
            prod(shape) * (NF4_BYTES if len(shape) == 2 and not name.startswith(UNQUANTIZED) else 2)
            for name, shape in shapes.items()
        )
    )
