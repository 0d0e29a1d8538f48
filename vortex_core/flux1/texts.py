"""The texts of a call, encoded: what is wanted, what to keep away from, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditioning import Conditioning
from .denoiser import Denoiser
from .nag import Nag


@dataclass(frozen=True, slots=True)
class Texts:
    """`wanted`: one for all pictures, or one for each. `avoided` counts by `guidance` above 1, or by `nag`."""

    wanted: Sequence[Conditioning]
    avoided: Conditioning | None = None
    guidance: float = 0.0
    nag: Nag | None = None

    @property
    def away(self) -> int:
        """Tokens of the text that is avoided inside each step."""
        return 0 if self.avoided is None or self.nag is None else self.avoided.txt.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of text in a step, at most."""
        apart = [self.avoided] if self.avoided is not None and self.nag is None else []
        return self.away + max(each.txt.shape[1] for each in (*self.wanted, *apart))

    def enter(self, denoiser: Denoiser, sigmas: Sequence[float]) -> None:
        """Bring the first texts to the device, for these noise levels."""
        if self.avoided is not None and self.nag is not None:
            denoiser.avoid(self.avoided, self.nag)
        denoiser.hold(self.wanted[0], sigmas)

    def velocity(self, denoiser: Denoiser, spare: Tensor | None = None) -> Callable[[Tensor, int, float], Tensor]:
        """The velocity of pictures `x` from number `first` on, at a noise level.

        `spare`: where guidance keeps the velocity of the text to avoid, as large as `x` or larger.
        """

        def found(x: Tensor, first: int, sigma: float) -> Tensor:
            one = self.wanted[first % len(self.wanted)]
            if self.avoided is None or self.nag is not None:
                return denoiser(x, sigma, one)
            assert spare is not None
            opposite = spare[: len(x)].copy_(denoiser(x, sigma, self.avoided))
            return torch.lerp(opposite, denoiser(x, sigma, one), self.guidance)

        return found
