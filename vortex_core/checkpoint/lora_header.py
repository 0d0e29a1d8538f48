"""A LoRA file as its header describes it: every key understood, refused or without effect, before a tensor is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import VortexCheckpointError, quoted
from ..flux1.spec import ModelSpec
from ..nf4 import UNQUANTIZED
from ..storage.files import PICKLES, SAFETENSORS, Raw, SafetensorsFiles, open_file
from ..storage.refused_formats import format_of
from ..storage.tensors import AGAIN, FLOATS
from ..utils.paths import expanded
from .lora_alphas import Alphas, read_alphas
from .lora_layers import NONE, TURN, Layer, Misfit, layer, trimmed, turns_halves
from .lora_places import Place, Places, places_of
from .lora_roles import is_lora, method, split
from .lora_strangers import by_depth, by_names, by_widths
from .lora_zeros import is_nothing

SHOWN = 3  # keys or layers that an error names
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
MOST_KEYS = 50_000
WHOLE = ("weight", "set")  # roles that replace what they name


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """A LoRA file, opened. `refused` and `ignored` say why, by the file's keys. Tensors are read by `lora_reader`."""

    raw: Raw
    spec: ModelSpec
    layers: tuple[Layer, ...]
    refused: Mapping[str, str]
    ignored: Mapping[str, str]
    alphas: Alphas

    @property
    def where(self) -> str:
        """The file, for errors."""
        return self.raw.where

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(self.raw.nbytes(name) for name in self.raw.names())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks."""
        return tuple(sorted({layer.rank for layer in self.layers if layer.rank is not None}))

    @property
    def whole(self) -> tuple[str, ...]:
        """The matrices that are kept in 4 bits and change as a whole, by no low-rank update."""
        places = (one.place for one in self.layers if one.copied)
        return tuple(sorted({place.module for place in places if in_four_bits(place.part, place.module)}))


@dataclass(slots=True)
class _Keys:
    """The keys of a file, by module and role where they have a place. Those of `tables` are in `refused`, too."""

    found: dict[str, tuple[Place, dict[str, str]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)


def in_four_bits(part: str, module: str) -> bool:
    """Whether a linear is kept in NF4."""
    return part == "t5" or (part == "transformer" and not module.startswith(UNQUANTIZED))


def open_lora(path: str | Path, spec: ModelSpec) -> LoraHeader:
    """Open a LoRA file for a model of these sizes; reads its header and nothing large.

    Raises `VortexCheckpointError`: damaged, a pickle, another model's, a key that is not understood, wrong shapes.
    """
    return header_of(open_source(path), spec)


def open_source(path: str | Path) -> SafetensorsFiles:
    """The safetensors file at `path`. Raises `VortexCheckpointError` for a folder, a pickle or another format."""
    where = expanded(path)
    try:
        if where.is_dir():
            raise VortexCheckpointError(f"{where} is a folder; give the .safetensors file in it.", path=str(where))
        if not where.exists():
            raise VortexCheckpointError(f"There is no LoRA at {where}.", path=str(where))
    except (OSError, ValueError) as error:
        raise VortexCheckpointError(f"{quoted(str(where))} cannot be a path ({error}).") from error
    if where.suffix.lower() not in (*SAFETENSORS, *PICKLES):
        raise VortexCheckpointError(f"{where} is not a .safetensors file, which LoRAs are.", path=str(where))
    raw = open_file(where)
    if not isinstance(raw, SafetensorsFiles):
        raise VortexCheckpointError(f"{where} is a GGUF file; a LoRA is a .safetensors file.", path=str(where))
    return raw


def header_of(raw: Raw, spec: ModelSpec) -> LoraHeader:
    """What `raw` is, as a LoRA for a model of these sizes. Raises as `open_lora`."""
    names = list(raw.names())
    _check_kind(raw, names)
    keys = _sorted(names, places_of(spec))
    unknown, refused, ignored = keys.unknown, keys.refused, keys.ignored
    if unknown:
        stranger = by_names(names) or by_depth(unknown, spec.flux)
        if stranger is not None:
            raise _error(raw, f"is {stranger}; Vortex draws with FLUX.1-schnell. Give a LoRA of FLUX.1.")
        shown = ", ".join(quoted(name) for name in unknown[:SHOWN])
        what = f"{len(unknown)} tensors" if len(unknown) > 1 else "1 tensor"
        raise _error(raw, f"holds {what} that Vortex does not understand, such as {shown}. It was not applied.")
    layers = tuple(_layers(raw, keys.found, refused))
    _check_fit(raw, layers, spec)
    _check_overlap(raw, layers)
    for roles in keys.tables.values():
        if is_nothing(raw, roles):
            for key in roles.values():
                del refused[key]
                ignored[key] = "it is of an embedding table, and adds zeros"
    for one in layers:
        if one.form == NONE:
            ignored |= dict.fromkeys(one.keys.values(), "it is an alpha without factors")
    layers = tuple(one for one in layers if one.form != NONE)
    if not layers and not refused and not ignored:
        raise _error(raw, "changes nothing: it holds no update.")
    return LoraHeader(raw, spec, layers, refused, ignored, read_alphas(raw))


def _check_kind(raw: Raw, names: list[str]) -> None:
    if not names:
        raise _error(raw, "is empty: it holds no tensors.")
    if len(names) > MOST_KEYS:
        raise _error(raw, f"holds {len(names)} tensors; a LoRA has at most {MOST_KEYS}.")
    words = format_of(names, raw.metadata)
    if words is not None:
        raise _error(raw, f"is {words}, which Vortex does not read. Use the LoRA in 16 or 32 bits.")
    if not is_lora(names):
        stranger = by_names(names)
        what = f" It is {stranger}." if stranger else ""
        raise _error(raw, f"is not a LoRA: no tensor in it is a factor of an update.{what}")


def _sorted(names: list[str], places: Places) -> _Keys:
    """Every key: with a place, refused, ignored, or not understood."""
    keys = _Keys()
    for key in names:
        words, part = method(key), split(key)
        if words is not None:
            keys.refused[key] = f"it is {words}, which Vortex does not apply"
        elif part is None:
            keys.unknown.append(key)
        elif (place := places.find(part[0])) is not None:
            _, roles = keys.found.setdefault(part[0], (place, {}))
            if part[1] in roles:
                keys.unknown.append(key)  # a second adapter, or the same factor under another name
            roles[part[1]] = key
        elif (note := places.note(part[0])) is None:
            keys.unknown.append(key)
        elif note[0]:
            keys.refused[key] = note[1]
            keys.tables.setdefault(part[0], {})[part[1]] = key
        else:
            keys.ignored[key] = note[1]
    return keys


def _layers(raw: Raw, found: Mapping[str, tuple[Place, dict[str, str]]], refused: dict[str, str]) -> Iterator[Layer]:
    for stem, (place, roles) in found.items():
        why = _refusal(place, roles)
        if why is not None:
            refused |= dict.fromkeys(roles.values(), why)
            continue
        for role, key in roles.items():
            if raw.dtype(key) not in FLOATS and not (role == "alpha" and raw.dtype(key) in INTEGERS):
                raise _error(raw, f"is damaged: {quoted(key)} is {raw.dtype(key)}; expected {' or '.join(FLOATS)}.")
        try:
            one = layer(stem, place, roles, {role: raw.shape(key) for role, key in roles.items()})
        except Misfit as error:
            raise _error(raw, f"does not fit together: {quoted(stem)} {error}. {AGAIN}") from error
        if one.form == TURN and place.swapped and not turns_halves(trimmed(raw.shape(roles["blocks"]))):
            refused |= dict.fromkeys(roles.values(), "its blocks cross the halves that change places here")
        else:
            yield one


def _refusal(place: Place, roles: Mapping[str, str]) -> str | None:
    """Why a module of a file is refused, whatever its sizes."""
    if "reshape" in roles:
        return "it changes the shape of a weight (reshape_weight), as FLUX.1's control models need"
    if not place.is_norm and any(role in roles for role in WHOLE):
        return "it is a whole weight, not an update of one"
    if place.part == "t5" and {"diff_b", "up_bias"} & roles.keys():
        return "T5 has no biases"
    if place.is_norm and place.part != "clip" and "diff_b" in roles:
        return "this norm has no bias"
    return None


def _check_fit(raw: Raw, layers: tuple[Layer, ...], spec: ModelSpec) -> None:
    """Raise where a layer's size is not that of its place."""
    wrong: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    for one in layers:
        wanted = (one.place.count, 1 if one.place.is_norm else one.place.shape[1])
        found = (one.size[0], one.size[1] or wanted[1])
        if found != wanted:
            wrong.setdefault(one.place.module, (found, wanted))
    if wrong:
        names = [name for one in layers for name in one.keys.values()]
        stranger = by_names(names)
        words = stranger or by_widths(wrong, spec.flux)
        more = f" ({len(wrong)} such layers)" if len(wrong) > 1 else ""
        raise _error(raw, f"does not fit this model: it is {words}{more}.")


def _check_overlap(raw: Raw, layers: tuple[Layer, ...]) -> None:
    """Raise where two layers change the same rows."""
    seen: dict[tuple[str, str], list[Layer]] = {}
    for one in layers:
        others = seen.setdefault((one.place.part, one.place.module), [])
        for other in others:
            if one.place.rows.start < other.place.rows.stop and other.place.rows.start < one.place.rows.stop:
                raise _error(
                    raw, f"says two things of {one.place.module}: {quoted(other.stem)} and {quoted(one.stem)}. {AGAIN}"
                )
        others.append(one)


def _error(raw: Raw, what: str) -> VortexCheckpointError:
    return VortexCheckpointError(f"{raw.where} {what}", path=raw.where)
