"""What travels between the nodes, and to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vortex_core.errors import VortexError, VortexInputError, quoted
from ..vortex_core.flux1.request import check_choice
from ..vortex_core.flux1.spec import MODES, MOST_BUDGET
from ..vortex_core.utils.numeric import finite

MODEL = "VORTEX_MODEL"


class AnyType(str):
    """A socket type that fits every other: the host compares with `received != wanted`."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


ANY = AnyType("*")


@dataclass(frozen=True, slots=True)
class Model:
    """The loader's light handle: it names weights and holds none. `fingerprint` stands for their content.

    `parts` are files for what `path` lacks, by `clip`, `t5` and `vae`.
    """

    name: str
    path: str
    fingerprint: str
    vram_budget: float  # GB
    mode: str
    parts: tuple[tuple[str, Path], ...] = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        budget = finite(self.vram_budget)
        if budget is None or not 0 < budget <= MOST_BUDGET:
            raise VortexInputError(f"vram_budget must be a number of GB above 0, not {quoted(self.vram_budget)}.")

    @property
    def key(self) -> tuple[str, str]:
        """Handles with equal keys share an engine. The budget is no part of it: it changes without loading again."""
        return self.fingerprint, self.mode

    @property
    def budget(self) -> int:
        """The VRAM budget in bytes."""
        return int(self.vram_budget * 1e9)


def verdict(check: Callable[[], Any]) -> str | bool:
    """The answer of a VALIDATE_INPUTS: True if `check` passes, else the reason in words."""
    try:
        check()
    except VortexError as error:
        return str(error)
    return True
