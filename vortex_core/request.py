"""What a caller asks for, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import VortexInputError, quoted
from .spec import MAX_SIZE, MAX_STEPS, MIN_SIZE, SIZE_MULTIPLE

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Request:
    """One call of `Engine.generate`. Raises `VortexInputError` for whatever is out of range."""

    seed: int
    height: int
    width: int
    steps: int
    batch_size: int

    def __post_init__(self) -> None:
        check_steps(self.steps)
        for side, pixels in (("height", self.height), ("width", self.width)):
            if not isinstance(pixels, int) or pixels % SIZE_MULTIPLE or not MIN_SIZE <= pixels <= MAX_SIZE:
                raise VortexInputError(
                    f"{side} must be a multiple of {SIZE_MULTIPLE} from {MIN_SIZE} to {MAX_SIZE} pixels, "
                    f"not {pixels!r}."
                )
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise VortexInputError(f"batch_size must be a whole number from 1, not {self.batch_size!r}.")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED - self.batch_size + 1:
            raise VortexInputError(
                f"seed must be a whole number from 0 to 2^64 - 1 (for the last picture of a batch too), "
                f"not {self.seed!r}."
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the pictures, `[B, H, W, 3]`."""
        return self.batch_size, self.height, self.width, 3

    def check_out(self, out: Tensor, device: torch.device) -> None:
        """Raise `VortexInputError` unless `out` can take these pictures in place."""
        if not out.is_contiguous():
            raise VortexInputError("out must be contiguous.")
        found = (tuple(out.shape), out.dtype, out.device)
        if found != (self.shape, torch.float32, device):
            raise VortexInputError(
                f"out must be {self.shape} torch.float32 on {device}; found {found[0]} {found[1]} on {found[2]}."
            )


def check_prompt(prompt: object) -> None:
    """Raise `VortexInputError` unless `prompt` is a text. It may be empty: schnell then draws what it likes."""
    if not isinstance(prompt, str):
        raise VortexInputError(f"The prompt must be a text, not {quoted(prompt)}.")


def check_steps(steps: object) -> None:
    """Raise `VortexInputError` unless `steps` is a whole number from 1 to 8."""
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise VortexInputError(f"steps must be from 1 to {MAX_STEPS} (schnell is made for 4), not {steps!r}.")


def check_embeddings(txt: Tensor, pooled: Tensor, context: int, vec: int) -> None:
    """Raise `VortexInputError` for other shapes than `[1, N, context]` and `[1, vec]`."""
    if txt.ndim != 3 or txt.shape[0] != 1 or txt.shape[2] != context:
        raise VortexInputError(f"txt must be [1, tokens, {context}] (T5 embeddings), not {list(txt.shape)}.")
    if tuple(pooled.shape) != (1, vec):
        raise VortexInputError(f"pooled must be [1, {vec}] (from CLIP), not {list(pooled.shape)}.")


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise `VortexInputError` for another shape than `[B, channels, H/8, W/8]`."""
    if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
        raise VortexInputError(f"latents must be [B, {channels}, H/8, W/8], at least one, not {list(latents.shape)}.")
