"""What travels between the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODEL = "VORTEX_MODEL"


class AnyType(str):
    """A socket type that equals every other: the host asks `received != wanted`."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


ANY = AnyType("*")


@dataclass(frozen=True, slots=True)
class Model:
    """The loader's light handle: which weights and how, never the weights. `fingerprint` stands for their content.

    `parts` are files for what `path` lacks, by `clip`, `t5` and `vae`.
    """

    name: str
    path: str
    fingerprint: str
    vram_budget: float  # GB
    mode: str
    parts: tuple[tuple[str, Path], ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What makes two handles the same engine; the budget can change without loading again."""
        return self.fingerprint, self.mode

    @property
    def budget(self) -> int:
        """The VRAM budget in bytes."""
        return int(self.vram_budget * 1e9)
