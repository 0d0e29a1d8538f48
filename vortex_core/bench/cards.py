"""The published figures of graphics cards, to predict times from. Only the H100 and the H200 were measured, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import VortexInputError, quoted

# Dense operations a clock of a GeForce multiprocessor, from RTX 30 to RTX 50, by what is multiplied. Sums are in fp32,
# which halves what is told of 16 bits and fp8, and in int32. RTX 30 has no fp8. (White papers of GA102, AD102, GB202.)
GEFORCE = {"bf16": 512, "fp8": 1024, "int8": 2048}
HOPPER_RATES = {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12}
ROOM = 0.15  # by which the VRAM that a driver tells may differ from what is printed on the box
WORDS = ("nvidia", "geforce", "80gb", "hbm3")  # of names, that tell no card from another
AMPERE, ADA, HOPPER, BLACKWELL = (8, 6), (8, 9), (9, 0), (12, 0)


@dataclass(frozen=True, slots=True)
class Card:
    """`vram` in bytes, `memory` in bytes a second, `rates` in operations a second by what is multiplied."""

    name: str
    capability: tuple[int, int]
    vram: float
    memory: float
    rates: Mapping[str, float]

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that it can run, as runtime/modes.py has them: first the one that `fast` takes.

        On RTX 50, where `fast` times both, that is int8 by these rates.
        """
        names = ("fp8", "int8") if self.capability == HOPPER else ("int8", "fp8")
        return (*(name for name in names if name in self.rates), "exact")


def _geforce(name: str, capability: tuple[int, int], vram: int, processors: int, ghz: float, memory: int) -> Card:
    """A GeForce of so many multiprocessors at its boost clock. `vram` in GiB, `memory` in GB a second."""
    each = {kind: rate for kind, rate in GEFORCE.items() if kind != "fp8" or capability >= ADA}
    rates = {kind: processors * ghz * 1e9 * rate for kind, rate in each.items()}
    return Card(name, capability, vram * 2.0**30, memory * 1e9, rates)


CARDS = (
    _geforce("RTX 3060", AMPERE, 12, 28, 1.777, 360),
    _geforce("RTX 3060 Ti", AMPERE, 8, 38, 1.665, 448),
    _geforce("RTX 3070", AMPERE, 8, 46, 1.725, 448),
    _geforce("RTX 3080", AMPERE, 10, 68, 1.710, 760),
    _geforce("RTX 3090", AMPERE, 24, 82, 1.695, 936),
    _geforce("RTX 4060", ADA, 8, 24, 2.460, 272),
    _geforce("RTX 4060 Ti", ADA, 8, 34, 2.535, 288),
    _geforce("RTX 4060 Ti", ADA, 16, 34, 2.535, 288),
    _geforce("RTX 4070", ADA, 12, 46, 2.475, 504),
    _geforce("RTX 4080", ADA, 16, 76, 2.505, 717),
    _geforce("RTX 4090", ADA, 24, 128, 2.520, 1008),
    _geforce("RTX 5060 Ti", BLACKWELL, 8, 36, 2.572, 448),
    _geforce("RTX 5060 Ti", BLACKWELL, 16, 36, 2.572, 448),
    _geforce("RTX 5070", BLACKWELL, 12, 48, 2.512, 672),
    _geforce("RTX 5080", BLACKWELL, 16, 84, 2.617, 960),
    _geforce("RTX 5090", BLACKWELL, 32, 170, 2.407, 1792),
    Card("H100", HOPPER, 80 * 2.0**30, 3.35e12, HOPPER_RATES),
    Card("H200", HOPPER, 141e9, 4.8e12, HOPPER_RATES),
)


def find(name: str, vram: float | None = None) -> Card | None:
    """The card of this name, as people or drivers write it, and of about `vram` bytes; None where there is none.

    Cards for laptops have other clocks, and other names.
    """
    named = (card for card in CARDS if _plain(card.name) == _plain(name))
    return next((card for card in named if vram is None or abs(vram / card.vram - 1) <= ROOM), None)


def get(name: str) -> Card:
    """`find`. Raises `VortexInputError`, which lists the cards that are known."""
    card = find(name)
    if card is None:
        known = ", ".join(dict.fromkeys(card.name for card in CARDS))
        raise VortexInputError(f"The figures of {quoted(name)} are not known. Known are: {known}.")
    return card


def _plain(name: str) -> str:
    return "".join(word for word in name.lower().split() if word not in WORDS)
