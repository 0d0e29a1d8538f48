"""A caller's arguments, checked before any work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import VortexInputError, quoted
from ..utils.numeric import finite, whole
from .nag import Nag
from .schedule import timesteps
from .spec import DEFAULT_STEPS, MAX_SIZE, MAX_STEPS, MIN_SIZE, SIZE_MULTIPLE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_SEED = 2**64 - 1
HALF = re.compile("[\ud800-\udfff]")  # half of a pair that stands for one character
MAX_BATCH = 1024  # no memory is known to hold more
MOST_GUIDANCE = 30.0
DEFAULT_STRENGTH = 0.6  # of a picture to begin from


@dataclass(frozen=True, slots=True)
class Request:
    """One call of `Engine.generate`, as Python's numbers. Raises `VortexInputError` for a value out of range.

    `sigmas`: the schedule, from the first noise level to 0; by default `steps` even ones from `strength` to 0.
    """

    seed: int
    height: int
    width: int
    steps: int
    batch_size: int
    sigmas: tuple[float, ...] | None = None
    strength: float = 1.0
    guidance: float = 0.0
    nag: Nag | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("height", "width", "batch_size", "seed")}
        numbers = {name: whole(value) for name, value in given.items()}
        check_size(self.height, self.width)
        batch, seed = numbers["batch_size"], numbers["seed"]
        if batch is None or not 1 <= batch <= MAX_BATCH:
            raise VortexInputError(
                f"batch_size must be a whole number from 1 to {MAX_BATCH}, not {quoted(given['batch_size'])}."
            )
        if seed is None or not 0 <= seed <= MAX_SEED - batch + 1:
            raise VortexInputError(
                f"seed must be a whole number from 0 to 2^64 - 1 (for the last picture of a batch too), "
                f"not {quoted(given['seed'])}."
            )
        reals = {"strength": check_strength(self.strength), "guidance": check_guidance(self.guidance)}
        for name, number in {**numbers, **reals, "steps": check_steps(self.steps)}.items():
            object.__setattr__(self, name, number)
        if self.nag is not None and self.guided:
            raise VortexInputError("Give guidance or nag, not both: each leads away from the negative prompt.")
        if self.sigmas is not None and self.strength != 1:
            raise VortexInputError("Give sigmas or strength, not both: sigmas begin at the strength.")
        given_sigmas = timesteps(self.steps, self.strength) if self.sigmas is None else check_schedule(self.sigmas)
        object.__setattr__(self, "sigmas", given_sigmas)

    @property
    def schedule(self) -> tuple[float, ...]:
        """Noise levels, each step's and a 0."""
        assert self.sigmas is not None
        return self.sigmas

    @property
    def guided(self) -> bool:
        """Whether each step runs twice, with the negative prompt too."""
        return self.guidance > 1

    @property
    def avoids(self) -> bool:
        """Whether a negative prompt counts."""
        return self.guided or self.nag is not None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The pictures' shape, `[B, H, W, 3]`."""
        return self.batch_size, self.height, self.width, 3

    def check_out(self, out: object, device: torch.device) -> None:
        """Raise `VortexInputError` unless these pictures can be written into `out`."""
        import torch  # here, so that a command can check its arguments before seconds of imports

        wanted = f"{self.shape} torch.float32 on {device}"
        if not isinstance(out, torch.Tensor):
            raise VortexInputError(f"out must be a tensor, {wanted}, not {quoted(out)}.")
        if out.layout is not torch.strided or not out.is_contiguous():
            raise VortexInputError(f"out must be contiguous: {wanted}.")
        if (tuple(out.shape), out.dtype, out.device) != (self.shape, torch.float32, device):
            raise VortexInputError(
                f"out must be {wanted}; found {quoted(tuple(out.shape))} {out.dtype} on {out.device}."
            )
        if out.requires_grad:
            raise VortexInputError("out must be a tensor that needs no gradient: pass out.detach().")


def check_prompt(prompt: object) -> None:
    """Raise `VortexInputError` unless `prompt` is a text. It may be empty; schnell then draws anything."""
    if not isinstance(prompt, str):
        raise VortexInputError(f"The prompt must be a text, not {quoted(prompt)}.")
    half = HALF.search(prompt)
    if half is not None:
        raise VortexInputError(
            f"The prompt has half a character (U+{ord(half[0]):04X}) at place {half.start()}: an emoji that was cut in "
            "two, or bytes that are not UTF-8. Write it anew."
        )


def check_steps(steps: object) -> int:
    """`steps`, a whole number from 1 to 8. Raises `VortexInputError` for anything else."""
    number = whole(steps)
    if number is None or not 1 <= number <= MAX_STEPS:
        raise VortexInputError(f"steps must be from 1 to {MAX_STEPS} (schnell is made for 4), not {quoted(steps)}.")
    return number


def check_size(height: object, width: object) -> None:
    """Raise `VortexInputError` unless these are multiples of 16 from 64 to 2048."""
    for side, given in (("height", height), ("width", width)):
        pixels = whole(given)
        if pixels is None or pixels % SIZE_MULTIPLE or not MIN_SIZE <= pixels <= MAX_SIZE:
            raise VortexInputError(
                f"{side} must be a multiple of {SIZE_MULTIPLE} from {MIN_SIZE} to {MAX_SIZE} pixels, "
                f"not {quoted(given)}."
            )


def check_strength(strength: object) -> float:
    """`strength`, above 0 and at most 1. Raises `VortexInputError` for anything else."""
    number = finite(strength)
    if number is None or not 0 < number <= 1:
        raise VortexInputError(f"strength must be a number above 0 and at most 1, not {quoted(strength)}.")
    return number


def check_guidance(guidance: object) -> float:
    """`guidance`, 0 or from 1 to 30. Raises `VortexInputError` for anything else."""
    number = finite(guidance)
    if number is None or not (number == 0 or 1 <= number <= MOST_GUIDANCE):
        raise VortexInputError(
            f"guidance must be 0 (off, as schnell is made) or a number from 1 to {MOST_GUIDANCE:g}, "
            f"not {quoted(guidance)}."
        )
    return number


def check_schedule(sigmas: object) -> tuple[float, ...]:
    """A schedule that falls from at most 1 to 0, of 1 to 8 steps. Raises `VortexInputError` for another."""
    values = check_sigmas(sigmas)
    if not (2 <= len(values) <= MAX_STEPS + 1 and values[-1] == 0 and all(a > b for a, b in pairwise(values))):
        raise VortexInputError(
            f"sigmas must fall from at most 1 to 0 in 1 to {MAX_STEPS} steps, such as {timesteps(DEFAULT_STEPS)}, "
            f"not {quoted(list(values))}."
        )
    return values


def check_sigmas(sigmas: object) -> tuple[float, ...]:
    """Noise levels from 0 to 1, at least one. Raises `VortexInputError` for anything else."""
    values = [finite(sigma) for sigma in sigmas] if isinstance(sigmas, Sequence) and not isinstance(sigmas, str) else []
    found = tuple(value for value in values if value is not None and 0 <= value <= 1)
    if not found or len(found) != len(values):
        raise VortexInputError(f"sigmas must be a sequence of numbers from 0 to 1, not {quoted(sigmas)}.")
    return found


def check_callback(name: str, function: object) -> None:
    """Raise `VortexInputError` unless `function` can be called, or is None."""
    if function is not None and not callable(function):
        raise VortexInputError(f"{name} must be a function, not {quoted(function)}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `VortexInputError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise VortexInputError(f"Unknown {name} {quoted(value)}; choose from {', '.join(choices)}.")


def check_embeddings(txt: object, pooled: object, context: int, vec: int) -> None:
    """Raise `VortexInputError` unless these are finite floats, `[1, N, context]` and `[1, vec]`."""
    for name, values, shape, origin in (
        ("txt", txt, (1, "tokens", context), "T5 embeddings"),
        ("pooled", pooled, (1, vec), "from CLIP"),
    ):
        if not check_floats(name, values, shape, origin).isfinite().all():
            raise VortexInputError(f"{name} holds NaN or infinity. Make the embeddings again.")


def check_latents(latents: object, channels: int) -> None:
    """Raise `VortexInputError` unless these are floats `[B, channels, H/8, W/8]`; in host memory, finite ones."""
    values = check_floats("latents", latents, ("B", channels, "H/8", "W/8"), "in the model's scale")
    if values.device.type == "cpu" and not values.isfinite().all():
        raise VortexInputError("latents hold NaN or infinity, and so would the picture.")


def check_floats(name: str, values: object, shape: tuple[int | str, ...], origin: str) -> Tensor:
    """`values`, if it is a tensor of floats of this `shape`; else `VortexInputError`. A name: any length but 0."""
    import torch

    wanted = f"{name} must be [{', '.join(map(str, shape))}] ({origin})"
    if not isinstance(values, torch.Tensor):
        raise VortexInputError(f"{wanted}, a tensor, not {quoted(values)}.")
    if values.ndim != len(shape) or not all(
        n == wants if isinstance(wants, int) else n for n, wants in zip(values.shape, shape, strict=True)
    ):
        raise VortexInputError(f"{wanted}, at least one, not {quoted(list(values.shape))}.")
    if not values.is_floating_point() or values.layout is not torch.strided or values.is_meta:
        raise VortexInputError(f"{wanted}, floats in memory, not {values.dtype}, {values.layout} on {values.device}.")
    return values
