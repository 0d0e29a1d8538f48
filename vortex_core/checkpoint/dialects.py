"""Recognises the files that people have: which parts a source holds, under which prefix, and in which layout.

A part is recognised by a tensor that only it has, under any of the prefixes in use.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import VortexCheckpointError, quoted
from ..flux1.spec import FluxSpec, dev_checkpoint_message
from ..storage.files import GgufFile, Raw
from ..storage.refused_formats import ARCHITECTURES, READ, format_of
from ..storage.tensors import Renamed, Stored, Tensors
from .key_maps import SWAPPED, flux_sources, t5_gguf_sources, vae_bfl_sources, vae_sources

SourceNames = Callable[[str], tuple[str, ...]]  # a canonical name to the names that it has in a file


def _after(prefix: str) -> SourceNames:
    return lambda name: (prefix + name,)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a part. `witness`: a tensor that only it has. `swapped`: modules whose halves are swapped."""

    words: str
    witness: str
    sources: SourceNames
    swapped: tuple[str, ...] = ()


PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
    "clip": ("", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "text_encoders.clip_l."),
    "t5": ("", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoders.t5xxl."),
    "vae": ("", "vae.", "first_stage_model."),
}
LAYOUTS = {
    "transformer": (
        Layout("BFL", "double_blocks.0.img_attn.qkv.weight", _after("")),
        Layout("diffusers", "transformer_blocks.0.attn.to_q.weight", flux_sources, SWAPPED),
    ),
    # transformers 4 writes CLIP's text model under `text_model.`, transformers 5 without
    "clip": (
        Layout("transformers", "text_model.encoder.layers.0.self_attn.q_proj.weight", _after("text_model.")),
        Layout("transformers", "encoder.layers.0.self_attn.q_proj.weight", _after("")),
    ),
    "t5": (
        Layout("transformers", "encoder.block.0.layer.0.SelfAttention.q.weight", _after("")),
        Layout("llama.cpp", "enc.blk.0.attn_q.weight", t5_gguf_sources),
    ),
    "vae": (
        Layout("BFL", "decoder.mid.block_1.norm1.weight", vae_bfl_sources),
        Layout("diffusers", "decoder.mid_block.resnets.0.norm1.weight", vae_sources),
    ),
}
GUIDANCE = ("guidance_in.", "time_text_embed.guidance_embedder.")
STRANGERS = {
    "input_blocks.0.0.weight": "a Stable Diffusion checkpoint (1, 2 or XL)",
    "down_blocks.0.resnets.0.conv1.weight": "a Stable Diffusion U-Net",
    "joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 checkpoint",
    "distilled_guidance_layer.in_proj.weight": "a Chroma checkpoint",
    "double_stream_modulation_img.lin.weight": "a FLUX.2 checkpoint",
}  # tensors of models that people mistake for FLUX.1, under any of the transformer's prefixes
SHORT = 8  # double blocks of Flex.1-alpha and others that were cut down and have guidance embeddings of their own
BLOCKS = (
    *("double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks"),
    *("block", "blk", "layers", "up", "up_blocks"),
)  # modules that are numbered from 0 on, without gaps
DEPTHS = {
    "transformer": (
        (("double_blocks", "transformer_blocks"), "double blocks", "double_blocks"),
        (("single_blocks", "single_transformer_blocks"), "single blocks", "single_blocks"),
    ),
    "clip": ((("encoder.layers", "text_model.encoder.layers"), "layers", "num_hidden_layers"),),
    "t5": ((("encoder.block", "enc.blk"), "blocks", "num_layers"),),
}  # of each kind of block: the modules that number it, its words, and the spec's field with the count
BLOCK = re.compile(r"(.*?)\.(\d+)\.")
LORA = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model in a source, under canonical names. `words` describe its layout and types."""

    tensors: Tensors
    stored: Stored
    words: str

    @property
    def is_nf4(self) -> bool:
        """Whether its linears are NF4 already."""
        return bool(self.stored.nf4)

    def blocks(self, *families: str) -> int:
        """How many blocks there are, in the first of `families` that is there."""
        found = numbered(self.stored.names())
        return next((len(found[family]) for family in families if family in found), 0)

    @property
    def nbytes(self) -> int:
        """About how many bytes it has in the file."""
        return sum(self.stored.nbytes(name) for name in self.stored.names())


def find_part(raw: Raw, kind: str) -> Part | None:
    """The part `kind` (`transformer`, `clip`, `t5` or `vae`) of a source, or None.

    Raises `VortexCheckpointError` for FLUX.1-dev, other models, quantizations that are not read, and missing blocks.
    """
    words = format_of(raw.names(), raw.metadata)
    if words is not None:
        raise VortexCheckpointError(f"{raw.where} is {words}, which Vortex does not read. {READ}", path=raw.where)
    if kind == "transformer":
        _refuse_strangers(raw)
    for prefix in PREFIXES[kind]:
        for layout in LAYOUTS[kind]:
            if prefix + layout.witness in raw:
                stored = Stored(raw, prefix)
                _refuse_gaps(stored)
                tensors = Renamed(stored, layout.sources, layout.swapped)
                return Part(tensors, stored, f"{layout.words} names, {storage(stored, layout.witness)}")
    return None


def _refuse_strangers(raw: Raw) -> None:
    if isinstance(raw, GgufFile) and raw.architecture not in (*ARCHITECTURES, None):
        raise VortexCheckpointError(
            f"{raw.where} is a GGUF file of a {quoted(raw.architecture)} model; Vortex draws with FLUX.1-schnell. "
            "Point it at such a model.",
            path=raw.where,
        )
    for prefix in PREFIXES["transformer"]:
        if any(name.startswith(tuple(prefix + guidance for guidance in GUIDANCE)) for name in raw.names()):
            raise VortexCheckpointError(f"{raw.where}: {_guided(raw, prefix)}", path=raw.where)
        found = next((what for name, what in STRANGERS.items() if prefix + name in raw), None)
        if found is not None:
            raise VortexCheckpointError(
                f"{raw.where} is {found}; Vortex draws with FLUX.1-schnell. Point it at such a model.", path=raw.where
            )
    if any(name.endswith(LORA) for name in raw.names()):
        raise VortexCheckpointError(
            f"{raw.where} is a LoRA, not a model: Vortex adds it to one. Point it at a FLUX.1-schnell model, and give "
            "the LoRA as `loras`.",
            path=raw.where,
        )


def _guided(raw: Raw, prefix: str) -> str:
    """The message for a transformer with guidance embeddings: FLUX.1-dev, or a model that was cut down."""
    numbers = numbered(name.removeprefix(prefix) for name in raw.names() if name.startswith(prefix))
    doubles = numbers.get("double_blocks") or numbers.get("transformer_blocks") or set()
    if len(doubles) != SHORT:
        return dev_checkpoint_message()
    return (
        f"It has guidance embeddings and {SHORT} double blocks, as Flex.1-alpha, Flex.2 and Flux.1-lite have; Vortex "
        "draws with FLUX.1-schnell, 4 steps and no guidance. Point it at a FLUX.1-schnell model instead."
    )


def numbered(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers of blocks, by the module that numbers them, such as `double_blocks` or `encoder.block`."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        block = BLOCK.match(name)
        if block and len(block[2]) < 9:
            found[block[1]].add(int(block[2]))
    return found


def check_depth(kind: str, part: Part, described: Any) -> None:
    """Raise `VortexCheckpointError` where a file holds more blocks than its spec says."""
    for names, words, key in DEPTHS.get(kind, ()):
        held = part.blocks(*names)
        said = getattr(described, key)
        if held > said:
            raise VortexCheckpointError(
                f"{part.stored.where} holds {held} {words} and would be read as having {said}: its config.json is "
                f"another model's, or {words[:-1]} {said} is not whole. Download it again.",
                path=part.stored.where,
            )


def depth(flux: FluxSpec) -> str:
    """How many blocks a transformer has, in words; and how many FLUX.1-schnell has, if `is_cut`."""
    words = f"{flux.double_blocks} double and {flux.single_blocks} single blocks"
    return f"{words}, where FLUX.1-schnell has 19 and 38" if is_cut(flux) else words


def is_cut(flux: FluxSpec) -> bool:
    """Whether a transformer as wide as FLUX.1-schnell has other numbers of blocks. A narrower one was trained so."""
    whole = FluxSpec()
    counts, wholes = ((spec.double_blocks, spec.single_blocks) for spec in (flux, whole))
    return flux.hidden == whole.hidden and counts != wholes


def _refuse_gaps(stored: Stored) -> None:
    for family, numbers in numbered(stored.names()).items():
        if family.rpartition(".")[2] not in BLOCKS:
            continue
        gap = next((number for number in range(max(numbers)) if number not in numbers), None)
        if gap is not None:
            raise VortexCheckpointError(
                f"{stored.where} lacks {family}.{gap}, though it has {family}.{max(numbers)}: the download is "
                "incomplete, or blocks were cut out of it. Download it again.",
                path=stored.where,
            )


def storage(stored: Stored, witness: str) -> str:
    """How the weights are stored, in words, such as `bf16`, `fp8 e4m3 scaled` or `NF4 with nested scales`."""
    if stored.nf4:
        packed = next(iter(stored.nf4))
        nested = f"{stored.prefix}{packed}.nested_absmax" in stored.raw
        return "NF4 with nested scales" if nested else "NF4"
    if isinstance(stored.raw, GgufFile):
        types = Counter(stored.raw.dtype(name) for name in stored.raw.names() if name.endswith(".weight"))
        return f"GGUF {types.most_common(1)[0][0]}"
    dtype = stored.dtype(witness)
    words = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8 e4m3", "F8_E5M2": "fp8 e5m2"}
    return words.get(dtype, dtype) + (" scaled" if stored.scaled else "")
