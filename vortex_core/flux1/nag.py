"""Normalized attention guidance (NAG): a negative prompt that counts in attention, for models without guidance.

What it computes is in flux1/attention.py. After Chen et al., arXiv 2505.21179.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import VortexInputError, quoted
from ..utils.numeric import finite

RANGES = {"scale": (1.0, 50.0), "tau": (1.0, 10.0), "alpha": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Nag:
    """How strongly attention is led away: `scale` times the difference, at most `tau` times the norm that a token had,
    of which `alpha` (0 to 1) is blended in.

    Raises `VortexInputError` for other numbers than 1 to 50, 1 to 10, and 0 to 1.
    """

    scale: float = 5.0
    tau: float = 1.5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            number = finite(getattr(self, name))
            if number is None or not low <= number <= high:
                raise VortexInputError(
                    f"{name} of NAG must be a number from {low:g} to {high:g}, not {quoted(getattr(self, name))}."
                )
            object.__setattr__(self, name, number)

    @property
    def terms(self) -> tuple[float, ...]:
        """As kernels take them."""
        return tuple(getattr(self, field.name) for field in fields(self))


def check_nag(given: object) -> Nag | None:
    """A caller's scale, or `Nag`; None for 0 and None. Raises as `Nag`."""
    if given is None or isinstance(given, Nag):
        return given
    number = finite(given)
    if number is None or not (number == 0 or RANGES["scale"][0] <= number <= RANGES["scale"][1]):
        raise VortexInputError(f"nag must be 0 (off), a scale from 1 to 50 (such as 5), or a Nag, not {quoted(given)}.")
    return Nag(number) if number else None
