"""The pictures that a benchmark draws."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import VortexInputError
from ..flux1.spec import DEFAULT_STEPS

PROMPTS = (
    "a red circle on a white background",
    "a blue square above a green star",
    "a small yellow ring",
    "a large purple triangle on a gray background",
    "an orange heart left of a black cross",
)
MAX_PROMPTS = 16  # all of them must stay in the engine's cache of conditionings
ITERATIONS, WARMUP, COLD = 50, 3, 10
REPORTED, MINUTES = 30, 3.0  # of a report for an issue: pictures of each size, and how long it draws


@dataclass(frozen=True, slots=True)
class Workload:
    """`iterations` pictures over rotating prompts and seeds, after `warmup` that do not count, all prompts cached.

    Then `cold` pictures, each of a prompt never seen before. Raises `VortexInputError` for counts out of range.
    """

    width: int
    height: int
    steps: int = DEFAULT_STEPS
    iterations: int = ITERATIONS
    warmup: int = WARMUP
    cold: int = COLD
    prompts: tuple[str, ...] = PROMPTS

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("warmup", 0), ("cold", 0)):
            if getattr(self, name) < least:
                raise VortexInputError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise VortexInputError(f"Give from 1 to {MAX_PROMPTS} prompts, not {len(self.prompts)}.")

    @property
    def words(self) -> str:
        """Size and steps, in words."""
        return f"{self.width} x {self.height}, {self.steps} step{'s' * (self.steps != 1)}"

    @property
    def total(self) -> int:
        """Pictures in all."""
        return self.warmup + self.iterations + self.cold
