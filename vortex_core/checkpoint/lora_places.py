"""Where a name in a LoRA file belongs: the part, the canonical module, its rows, and halves that change places.

Trainers write a module's name with dots or with underscores, under many prefixes, and in BFL's, diffusers' or XLabs'
words. One table holds them all; whatever is not in it is not understood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ..flux1.spec import ClipSpec, FluxSpec, ModelSpec, T5Spec
from .key_maps import SWAPPED, flux_sources, modulation_shapes, source_rows, step_shapes

DOTTED = (
    *("base_model.model.", "transformer.", "diffusion_model.", "model.", "unet.", "_orig_mod."),
    *("text_encoders.", "text_encoder_2.", "text_encoder.", "clip_l.", "t5xxl.", "t5."),
)  # what a name with dots may begin with, one after another
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
GUIDANCE = ("guidance_in", "time_text_embed.guidance_embedder")
UNUSED = {
    "text_projection": "FLUX takes CLIP's vector before its projection",
    "embeddings.position_ids": "they are numbers of positions",
}
TABLES = {
    "embeddings.token_embedding": "CLIP's",
    "embeddings.position_embedding": "CLIP's",
    "shared": "T5's",
    "encoder.embed_tokens": "T5's",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "T5's",
}  # embedding tables, which nothing is added to
MOST_PREFIXES = 6
SECOND = ("lora_te2_text_model_", "text_encoder_2.text_model.")  # Stable Diffusion XL's larger CLIP


@dataclass(frozen=True, slots=True)
class Place:
    """`rows` of the canonical matrix or norm `module` of a `part`. `shape`: of the whole; `swapped`: halves change."""

    part: str
    module: str
    shape: tuple[int, ...]
    rows: slice
    swapped: bool = False

    @property
    def count(self) -> int:
        """How many rows."""
        return self.rows.stop - self.rows.start

    @property
    def is_norm(self) -> bool:
        """Whether it is the scale of a norm."""
        return len(self.shape) == 1


@cache
def places_of(spec: ModelSpec) -> Places:
    """The places of a model, made once."""
    return Places(spec)


class Places:
    """Every place in a model of these sizes, by the names that files have for it."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._dotted = dict(_transformer(spec.flux))
        for name, place in (*_t5(spec.t5), *_clip(spec.clip)):
            self._dotted[name] = place
        self._flat = {name.replace(".", "_"): place for name, place in self._dotted.items()}
        self._notes = dict(_notes())
        self._flat_notes = {name.replace(".", "_"): note for name, note in self._notes.items()}

    def find(self, stem: str) -> Place | None:
        """The place of a module's name in a file; None where it has none."""
        if stem.startswith(SECOND):
            return None
        return next((found for name, flat in bare(stem) if (found := self._table(flat).get(name)) is not None), None)

    def note(self, stem: str) -> tuple[bool, str] | None:
        """Whether a module without a place is refused (else it has no effect), and why; None where it is unknown."""
        for name, flat in bare(stem):
            notes = self._flat_notes if flat else self._notes
            if name in notes:
                return notes[name]
        return None

    def _table(self, flat: bool) -> dict[str, Place]:
        return self._flat if flat else self._dotted


def bare(stem: str) -> Iterator[tuple[str, bool]]:
    """A name without its prefixes, the longest first, and whether it is written with underscores."""
    for prefix in FLAT:
        if stem.startswith(prefix):
            yield stem.removeprefix(prefix), True
    for _ in range(MOST_PREFIXES):
        yield stem, False
        found = next((prefix for prefix in DOTTED if stem.startswith(prefix)), None)
        if found is None:
            break
        stem = stem.removeprefix(found)


def _transformer(spec: FluxSpec) -> Iterator[tuple[str, Place]]:
    for name, shape in (step_shapes(spec) | modulation_shapes(spec)).items():
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            continue
        yield module, _whole("transformer", module, shape)
        if kind == "scale":
            yield name, _whole("transformer", module, shape)  # older ComfyUI: `query_norm.scale.set_weight`
        start = 0
        for source, rows in source_rows(flux_sources(name), shape[0]):
            stop = start + rows
            place = Place("transformer", module, shape, slice(start, stop), module in SWAPPED)
            for written in _variants(source.rpartition(".")[0]):
                yield written, place
            start = stop
    width = spec.hidden
    for block in range(spec.double_blocks):
        for number, stream in ((1, "img"), (2, "txt")):
            theirs, ours = f"double_blocks.{block}.processor", f"double_blocks.{block}.{stream}_attn"
            yield f"{theirs}.qkv_lora{number}", _whole("transformer", f"{ours}.qkv", (3 * width, width))
            yield f"{theirs}.proj_lora{number}", _whole("transformer", f"{ours}.proj", (width, width))
            added = "" if stream == "img" else "added_"
            fused = f"transformer_blocks.{block}.attn.to_{added}qkv"  # diffusers' `fuse_qkv_projections`
            yield fused, _whole("transformer", f"{ours}.qkv", (3 * width, width))
    for block in range(spec.single_blocks):
        theirs, wide = f"single_blocks.{block}", (3 * width + spec.mlp, width)
        qkv = Place("transformer", f"{theirs}.linear1", wide, slice(0, 3 * width))
        yield f"{theirs}.linear1_qkv", qkv
        yield f"single_transformer_blocks.{block}.attn.to_qkv", qkv
        yield f"{theirs}.processor.qkv", qkv  # without the end `_lora.down.weight`
        narrow = _whole("transformer", f"{theirs}.linear2", (width, width + spec.mlp))
        yield f"{theirs}.processor.proj", narrow


def _variants(name: str) -> Iterator[str]:
    """A diffusers name, and its other spellings."""
    yield name
    if ".attn.to_" in name or ".attn.add_" in name:
        processor = name.replace(".attn.", ".attn.processor.")
        yield processor
        yield processor.removesuffix(".0")
        if name.endswith(".0"):
            yield name.removesuffix(".0")
    for ours, theirs in ((".net.0.proj", ".linear_in"), (".net.2", ".linear_out")):
        if name.endswith(ours):
            yield name.removesuffix(ours) + theirs  # LyCORIS' LoKr


def _whole(part: str, module: str, shape: tuple[int, ...]) -> Place:
    return Place(part, module, shape, slice(0, shape[0]))


def _t5(spec: T5Spec) -> Iterator[tuple[str, Place]]:
    width, inner = spec.d_model, spec.d_kv * spec.num_heads
    for block in range(spec.num_layers):
        layer = f"encoder.block.{block}.layer"
        linears = {f"0.SelfAttention.{name}": (inner, width) for name in "qkv"}
        linears |= {"0.SelfAttention.o": (width, inner), "1.DenseReluDense.wo": (width, spec.d_ff)}
        linears |= {f"1.DenseReluDense.wi_{number}": (spec.d_ff, width) for number in (0, 1)}
        shapes: dict[str, tuple[int, ...]] = {**linears, "0.layer_norm": (width,), "1.layer_norm": (width,)}
        for name, shape in shapes.items():
            yield f"{layer}.{name}", _whole("t5", f"{layer}.{name}", shape)
    yield "encoder.final_layer_norm", _whole("t5", "encoder.final_layer_norm", (width,))


def _clip(spec: ClipSpec) -> Iterator[tuple[str, Place]]:
    width, wide = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"final_layer_norm": (width,)}
    for layer in (f"encoder.layers.{number}" for number in range(spec.num_hidden_layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.mlp.fc1": (wide, width), f"{layer}.mlp.fc2": (width, wide)}
        shapes |= {f"{layer}.layer_norm{number}": (width,) for number in (1, 2)}
    for module, shape in shapes.items():
        for prefix in ("", "text_model."):
            yield prefix + module, _whole("clip", module, shape)


def _notes() -> Iterator[tuple[str, tuple[bool, str]]]:
    guidance = "it acts on FLUX.1-dev's guidance, which FLUX.1-schnell has not"
    for inner in ("in_layer", "out_layer", "linear_1", "linear_2"):
        for name in GUIDANCE:
            yield f"{name}.{inner}", (False, guidance)
    for prefix in ("", "text_model."):
        for name, why in UNUSED.items():
            yield prefix + name, (False, why)
        for name, owner in TABLES.items():
            yield prefix + name, (True, f"it changes {owner} embedding table, which Vortex leaves as it is")
