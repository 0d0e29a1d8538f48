"""The transformer as those who sample see it: latents, a noise level and a conditioning in, a velocity out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import ScaledTensor
from ..quant.linear import multiply
from .conditioning import Conditioning
from .nag import Nag
from .step_buffers import Rope
from .transformer import Transformer


class Velocity(Protocol):
    """From latents, text, modulation, positions and the terms of NAG to a velocity: see `Transformer`."""

    def __call__(self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, nag: Tensor | None = None) -> Tensor: ...


class Denoiser:
    """`velocity` with the text and modulation of one conditioning at a time in `inputs` (`Model.call_inputs`)."""

    def __init__(self, transformer: Transformer, velocity: Velocity, inputs: Mapping[str, Tensor]) -> None:
        self._txt_in, self._velocity, self._inputs = transformer.txt_in, velocity, inputs
        self._held: tuple[Conditioning, tuple[float, ...]] | None = None
        self._away = 0  # tokens of the text to avoid

    def avoid(self, conditioning: Conditioning, nag: Nag) -> None:
        """Lead all steps away from this text. It has its place before the others, and none of its own modulation."""
        self._away = conditioning.txt.shape[1]
        self._embed(conditioning, 0)
        self._inputs["nag"].copy_(torch.tensor(nag.terms))

    def hold(self, conditioning: Conditioning, sigmas: Sequence[float]) -> None:
        """Bring what this conditioning has for these levels to the device; at most 8."""
        self._embed(conditioning, self._away)
        if tuple(sigmas) == conditioning.sigmas:
            self._inputs["modulation"][: len(sigmas)].copy_(conditioning.modulation, non_blocking=True)
        else:
            for row, sigma in zip(self._inputs["modulation"], sigmas, strict=False):
                row.copy_(conditioning.rows(sigma), non_blocking=True)
        self._held = conditioning, tuple(sigmas)

    def place(self, tables: Rope) -> None:
        """Bring the positions of all tokens to the device, for the longest text."""
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self._inputs[name].copy_(table, non_blocking=True)

    def __call__(self, img: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The velocity of packed latents `[B, S, 64]`, all at the noise level `sigma` of the conditioning's table.

        fp32, valid until the next call.
        """
        if self._held is None or self._held[0] is not conditioning or sigma not in self._held[1]:
            self.hold(conditioning, (sigma,))
        assert self._held is not None
        modulation = self._inputs["modulation"][self._held[1].index(sigma)]
        tokens, known = self._away + conditioning.txt.shape[1], self._inputs["txt"].shape[1]
        cos, sin = (self._inputs[name][known - tokens :] for name in ("cos", "sin"))  # text has no places: rows alike
        txt = self._inputs["txt"][:, :tokens].expand(len(img), -1, -1)
        return self._velocity(img, txt, modulation, (cos, sin), self._inputs["nag"] if self._away else None)

    def _embed(self, conditioning: Conditioning, start: int) -> None:
        place = slice(start, start + conditioning.txt.shape[1])
        embeddings = self._inputs["embeddings"][:, place].copy_(conditioning.txt, non_blocking=True)
        multiply(self._txt_in, ScaledTensor(embeddings), self._inputs["txt"][:, place])
