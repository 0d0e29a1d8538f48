"""From the patches of the host's LoRA loaders to LoRAs that the engine draws with.

The host's MODEL holds `patches[key] = [(strength, what, strength_model, offset, function), ...]`. `what` is an adapter
(`weight_adapter/`), whose tensors are under names of their own, or a tuple such as `("diff", (tensor,))`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..vortex_core.errors import VortexInputError, quoted

if TYPE_CHECKING:
    from ..vortex_core.flux1.spec import ModelSpec
    from ..vortex_core.quant.adapters import LoraFile

PARTS = {
    "diffusion_model.": "transformer",
    "clip_l.transformer.text_model.": "clip",
    "t5xxl.transformer.": "t5",
}  # what the host's keys begin with
UNUSED = ("clip_l.transformer.text_projection.", "clip_l.logit_scale")  # FLUX takes CLIP's vector before its projection
WHERE = "A LoRA from ComfyUI's loader"
KEPT = 4  # LoRAs that were translated
ROLES = {
    "lora": ("up", "down", "alpha", "mid", "dora", "reshape"),
    "loha": ("w1_a", "w1_b", "alpha", "w2_a", "w2_b", "t1", "t2", "dora"),
    "lokr": ("k1", "k2", "alpha", "k1_a", "k1_b", "k2_a", "k2_b", "kt", "dora"),
    "glora": ("a1", "a2", "b1", "b2", "alpha", "dora"),
}  # of the host's adapters: what each of their `weights` is, in the words of `lora_roles`
Found = tuple[Any, ...]  # one entry of the host's patches


class Patch(NamedTuple):
    """What one entry does: `values` by role, to `rows` (None: all) of a module of a `part`.

    `swapped`: halves change places.
    """

    part: str
    module: str
    values: Mapping[str, Any]
    rows: tuple[int, int] | None
    swapped: bool
    strength: float

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal to that of the same tensors at the same place, while those live; whatever the strength is."""
        values = ((role, value if isinstance(value, float) else id(value)) for role, value in self.values.items())
        return self.part, self.module, self.rows, self.swapped, *values

    def meets(self, other: Patch) -> bool:
        """Whether both change the same rows of the same tensor."""
        if (self.part, self.module) != (other.part, other.module) or ("diff_b" in self.values) != (
            "diff_b" in other.values
        ):
            return False
        if self.rows is None or other.rows is None:
            return True
        return self.rows[0] < other.rows[1] and other.rows[0] < self.rows[1]


@dataclass(slots=True)
class _Layer:
    """Patches of one strength, none of which meet."""

    strength: float
    patches: dict[str, list[Patch]] = field(default_factory=dict)

    def takes(self, patch: Patch) -> bool:
        there = self.patches.setdefault(patch.module, [])
        if patch.strength != self.strength or any(patch.meets(other) for other in there):
            return False
        there.append(patch)
        return True

    def __iter__(self) -> Iterator[Patch]:
        return (patch for several in self.patches.values() for patch in several)


class Translator:
    """Makes LoRAs of patches, and remembers the latest: another strength reads nothing again."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._known: OrderedDict[tuple[Any, ...], tuple[LoraFile, list[Patch]]] = OrderedDict()

    def __call__(self, patches: Mapping[str, list[Found]]) -> tuple[tuple[LoraFile, float], ...]:
        """The LoRAs and their strengths. Raises as `check`, and `VortexCheckpointError` for what does not fit."""
        layers: list[_Layer] = []
        for key, several in patches.items():
            for found in several:
                patch = read(key, found)
                if patch is not None and not any(layer.takes(patch) for layer in layers):
                    layers.append(_Layer(patch.strength))
                    layers[-1].takes(patch)
        made = tuple((self._file(list(layer)), layer.strength) for layer in layers)
        while len(self._known) > max(KEPT, len(made)):
            self._known.popitem(last=False)
        return made

    def _file(self, patches: list[Patch]) -> LoraFile:
        import torch

        from ..vortex_core.checkpoint.lora_memory import Change, lora_of

        key = tuple(patch.signature for patch in patches)
        if key not in self._known:
            changes = (
                Change(
                    patch.module,
                    {role: torch.as_tensor(value) for role, value in patch.values.items()},
                    None if patch.rows is None else slice(*patch.rows),
                    patch.swapped,
                    patch.part,
                )
                for patch in patches
            )
            self._known[key] = lora_of(changes, WHERE, self._spec), patches  # the tensors live as long as their ids
        self._known.move_to_end(key)
        return self._known[key][0]


def check(patches: Mapping[Any, Any], strength_model: float) -> None:
    """Raise `VortexInputError`, in a sentence, for what the host's `add_patches` gets and no engine can draw with."""
    for key, what in patches.items():
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]
        read(name, (1.0, what, strength_model, offset, function))


def read(key: str, found: Found) -> Patch | None:
    """One entry of the host's patches; None where it changes nothing. Raises `VortexInputError` for what is refused."""
    strength, what, strength_model, offset, function = (*found, None, None)[:5]
    if strength_model != 1.0 or isinstance(what, list):
        raise cannot_be("merged")
    part, module, kind = split(key)
    method, weights = method_of(what)
    if kind == "bias":
        values = _beside(key, method, weights, "diff_b")
    elif is_norm(module):
        values = _beside(key, method, weights, "diff")
    elif method in ROLES:
        values = _factors(key, method, weights)
    elif method == "diff":
        values = _beside(key, method, weights, "diff")
    else:
        raise refused(key, f"it is {quoted(method)}, which is no low-rank update")
    if method == "set":
        strength = 1.0  # as the host has it
    if not values or strength == 0 or key.startswith(UNUSED):
        return None
    return Patch(part, module, values, _rows(key, offset), _swapped(key, function), float(strength))


def split(key: str) -> tuple[str, str, str]:
    """The part, the module and the kind of tensor (`weight`) of one of the host's keys."""
    prefix = next((prefix for prefix in PARTS if key.startswith(prefix)), "")
    module, _, kind = key.removeprefix(prefix).rpartition(".")
    return PARTS.get(prefix, "transformer"), module, kind


def is_norm(module: str) -> bool:
    """Whether a module is a norm: `query_norm`, `layer_norm1`."""
    return module.rstrip("12").endswith("_norm")


def method_of(what: Any) -> tuple[str, Any]:
    """The method of an entry, and its tensors."""
    if hasattr(what, "weights"):
        return str(getattr(what, "name", type(what).__name__)), what.weights
    if isinstance(what, tuple) and len(what) == 1:
        return "diff", what
    if isinstance(what, tuple) and len(what) == 2:
        return str(what[0]), what[1]
    return type(what).__name__, ()


def _factors(key: str, method: str, weights: Any) -> dict[str, Any]:
    values = {
        role: float(value) if role == "alpha" else value
        for role, value in zip(ROLES[method], weights, strict=False)
        if value is not None
    }
    if "reshape" in values:
        raise refused(key, "it changes the shape of a weight, as FLUX.1's control models need")
    return values


def _beside(key: str, method: str, weights: Any, role: str) -> dict[str, Any]:
    if method not in ("diff", "set") or (method == "set" and role == "diff_b"):
        raise refused(key, f"it is {quoted(method)} of what is no matrix")
    return {"set" if method == "set" else role: weights[0]}


def _rows(key: str, offset: Any) -> tuple[int, int] | None:
    if offset is None:
        return None
    if len(offset) != 3 or offset[0] != 0:
        raise refused(key, "it changes some columns of a weight")
    return offset[1], offset[1] + offset[2]


def _swapped(key: str, function: Any) -> bool:
    name = getattr(function, "__name__", None)
    if function is not None and name != "swap_scale_shift":
        raise refused(key, f"the host would turn it by {quoted(str(name))}, which Vortex does not know")
    return function is not None


def refused(key: str, why: str) -> VortexInputError:
    """The error for an entry that no engine can draw with."""
    name = ".".join(split(key)[1:])
    return VortexInputError(f"{WHERE} cannot be added to 4-bit weights: {name}: {why}.")


def cannot_be(what: str) -> VortexInputError:
    """The error for what needs the weights themselves; `what`: "merged"."""
    return VortexInputError(
        f"The MODEL of NF4 Flux Loader cannot be {what}: its weights are in 4 bits, in Vortex's engine. Use Load "
        "Diffusion Model with a file in 16 bits."
    )
