"""What travels between the nodes, and to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..vortex_core.errors import VortexError, VortexInputError, quoted
from ..vortex_core.flux1.request import check_choice
from ..vortex_core.flux1.spec import MODES, MOST_BUDGET, ModelSpec
from ..vortex_core.utils.numeric import finite

MODEL = "VORTEX_MODEL"
RELEASED = ModelSpec()
STRONGEST = 10.0  # of a LoRA, as the node's widget has it
NAMED = 2  # LoRAs that a line of text names; of more it says how many


class AnyType(str):
    """A socket type that fits every other: the host compares with `received != wanted`."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


ANY = AnyType("*")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA that a model is drawn with. `fingerprint` stands for the file's content."""

    name: str
    path: str
    fingerprint: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        strength = finite(self.strength)
        if strength is None or abs(strength) > STRONGEST:
            raise VortexInputError(
                f"strength must be a number from {-STRONGEST:g} to {STRONGEST:g}, not {quoted(self.strength)}."
            )


@dataclass(frozen=True, slots=True)
class Model:
    """The loader's light handle: it names weights and holds none. `fingerprint` stands for their content.

    `parts` are files for what `path` lacks, by `clip`, `t5` and `vae`. `spec`: the sizes of all parts. `loras` are
    those of the Vortex LoRA nodes since the loader, in order.
    """

    name: str
    path: str
    fingerprint: str
    vram_budget: float  # GB
    mode: str
    parts: tuple[tuple[str, Path], ...] = ()
    spec: ModelSpec = RELEASED
    loras: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        budget = finite(self.vram_budget)
        if budget is None or not 0 < budget <= MOST_BUDGET:
            raise VortexInputError(f"vram_budget must be a number of GB above 0, not {quoted(self.vram_budget)}.")

    @property
    def key(self) -> tuple[str, str]:
        """Handles with equal keys share an engine. Budget and LoRAs change without loading again, and are not in it."""
        return self.fingerprint, self.mode

    @property
    def budget(self) -> int:
        """The VRAM budget in bytes."""
        return int(self.vram_budget * 1e9)

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """The LoRAs as the engine takes them."""
        return [(lora.path, lora.strength) for lora in self.loras]

    @property
    def words(self) -> str:
        """The model and its LoRAs, to be read."""
        if len(self.loras) > NAMED:
            return f"{self.name}, {len(self.loras)} LoRAs"
        return ", ".join((self.name, *(f"{lora.name} x {lora.strength:g}" for lora in self.loras)))

    def with_lora(self, lora: Lora) -> Model:
        """This model, drawn with one more LoRA."""
        return replace(self, loras=(*self.loras, lora))


def verdict(check: Callable[[], Any]) -> str | bool:
    """The answer of a VALIDATE_INPUTS: True if `check` passes, else the reason in words."""
    try:
        check()
    except VortexError as error:
        return str(error)
    return True
