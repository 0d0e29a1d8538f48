"""Prompt time: from a prompt to a `Conditioning`, which holds all that a picture needs of it.

That is T5's embeddings and the modulation of every block at every step. Modulation depends only on the noise level
(sigma) and the pooled text, and its linears are 3.2 of FLUX's 11.9 B parameters. They run here, once a prompt, for all
steps in one product, so they need not stay on the device while it draws. Another schedule gets a table of its own, also
in one product, so that a picture does not depend on what was asked before.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import Linear

from ..device.finite_pictures import check_finite
from ..device.select import host_buffer
from ..errors import VortexInputError, quoted
from .request import check_floats, check_sigmas
from .spec import MAX_STEPS, MODULATION_ROWS, FluxSpec
from .text_encoders import T5, Clip, Tokens, note_syntax, tokenize_prompt

Staged = Callable[[], AbstractContextManager[None]]
CACHED = 16  # prompts; at full size about 10 MB of host memory each, 18 if pinned, since torch rounds up
SCHEDULES = 4  # of a Conditioning that were asked for later, and are kept


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Conditioning:
    """What step time needs of a prompt. It is in host memory, so that a cache of many costs no VRAM.

    `txt` `[1, N, context]`: T5's embeddings. `pooled` `[1, vec]`: CLIP's. `sigmas`: noise levels from 0 to 1, and
    `modulation` `[sigmas, rows, D]`: for each of them shifts, scales and gates, in the order of `MODULATION_ROWS`
    (flux1/spec.py) for each block. For other levels the engine makes another table: `Engine.schedule`.
    """

    txt: Tensor
    pooled: Tensor
    sigmas: tuple[float, ...]
    modulation: Tensor

    def __post_init__(self) -> None:
        """Raise `VortexInputError` for other tensors, `NotFiniteError` for NaN: once here, not for each picture."""
        object.__setattr__(self, "sigmas", in_fp32(check_sigmas(self.sigmas)))
        shapes: dict[str, tuple[str | int, ...]] = {
            "txt": (1, "N", "context"), "pooled": (1, "vec"), "modulation": (len(self.sigmas), "rows", "D"),
        }  # fmt: skip
        for name, shape in shapes.items():
            values = check_floats(name, getattr(self, name), shape, "of a Conditioning")
            if values.device.type != "cpu":
                raise VortexInputError(f"{name} of a Conditioning is in host memory, not on {values.device}.")
            check_finite(values, f"{name} of the Conditioning")

    def rows(self, sigma: float) -> Tensor:
        """The modulation `[rows, D]` at a noise level of the table."""
        return self.modulation[self.sigmas.index(in_fp32((sigma,))[0])]


def check_conditioning(given: object, spec: FluxSpec, dtype: torch.dtype) -> None:
    """Raise `VortexInputError` unless this is a Conditioning of a model with this `spec` and `dtype`."""
    if not isinstance(given, Conditioning):
        raise VortexInputError(f"A Conditioning comes from the engine's encode or condition; this is {quoted(given)}.")
    widths = (given.txt.shape[2], given.pooled.shape[1], *given.modulation.shape[1:])
    found = (widths, *(values.dtype for values in (given.txt, given.pooled, given.modulation)))
    wanted = ((spec.context, spec.vec, spec.modulation_rows, spec.hidden), dtype, dtype, dtype)
    if found != wanted:
        raise VortexInputError(
            f"This Conditioning is of another model, or of another dtype: widths and types are {found}, not {wanted}. "
            "Encode the prompt with the engine that draws."
        )


def in_fp32(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Noise levels as the model gets them, so that those of a caller's fp32 tensor are the same."""
    return tuple(float(np.float32(sigma)) for sigma in sigmas)


class Embedder(nn.Module):
    """Two linears with SiLU between them, from a feature to the width of the transformer."""

    def __init__(self, inside: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = Linear(inside, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inside]` to `[..., D]`."""
        return self.out_layer(F.silu(self.in_layer(x)))


class BlockModulation(nn.Module):
    """The modulation linears of one block of `kind`, a key of `MODULATION_ROWS`. They may stream together."""

    def __init__(self, hidden: int, kind: str) -> None:
        super().__init__()
        for path, rows in MODULATION_ROWS[kind].items():
            parent, _, name = path.partition(".")
            self.add_module(parent, nn.ModuleDict({name: Linear(hidden, rows * hidden)}))

    def forward(self, vec: Tensor) -> list[Tensor]:
        """`[steps, D]` to the rows of each linear, `[steps, rows * D]`."""
        return [linear(vec) for parent in self.children() for linear in parent.children()]


class Modulation(nn.Module):
    """The part of FLUX that sees only time and pooled text. Module names are the checkpoint's."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        doubles, singles = range(spec.double_blocks), range(spec.single_blocks)
        self.time_in = Embedder(256, spec.hidden)
        self.vector_in = Embedder(spec.vec, spec.hidden)
        self.double_blocks = nn.ModuleList(BlockModulation(spec.hidden, "double_blocks") for _ in doubles)
        self.single_blocks = nn.ModuleList(BlockModulation(spec.hidden, "single_blocks") for _ in singles)
        self.final_layer = BlockModulation(spec.hidden, "final_layer")

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """Timesteps `t` `[steps]` in 0..1, fp32, and `pooled` `[1, vec]` to the table `[steps, rows, D]`.

        Time is embedded in fp32, as BFL and ComfyUI do. diffusers multiplies in the model's type: .75 becomes 752.
        """
        emb = timestep_embedding(t * 1000).to(pooled.dtype)
        vec = F.silu(self.time_in(emb) + self.vector_in(pooled))
        blocks = [*self.double_blocks, *self.single_blocks, self.final_layer]
        table = torch.cat([rows for block in blocks for rows in block(vec)], dim=-1)
        return table.unflatten(-1, (-1, vec.shape[-1]))


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000) -> Tensor:
    """Sinusoids of `t` (0 to 1000): fp32 `[steps, dim]`, cosines first."""
    half = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * half / (dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Conditioner:
    """Encoders, modulation and a cache of the latest prompts. Inside `staged`, they can run on `device`."""

    def __init__(
        self, tokenizers: tuple[Tokenizer, Tokenizer], clip: Clip, t5: T5, modulation: Modulation, device: torch.device
    ) -> None:
        self.tokenizers, self.device = tokenizers, device
        self.clip, self.t5, self.modulation = clip, t5, modulation
        self.adapters: tuple[tuple[object, float], ...] = ()  # what LoRAs change of the parts here: cached apart
        self._tokens: dict[str, tuple[Tokens, Tokens]] = {}  # of the latest prompt
        self._cache: OrderedDict[tuple[object, ...], Conditioning] = OrderedDict()
        self._schedules: WeakKeyDictionary[Conditioning, OrderedDict[tuple[object, ...], Conditioning]] = (
            WeakKeyDictionary()
        )

    def __call__(self, prompt: str, sigmas: Sequence[float], staged: Staged) -> Conditioning:
        """The conditioning of a prompt; from the cache if its tokens were seen before.

        Warns about text that is cut off, and about syntax of other programs.
        """
        note_syntax(prompt)
        clip, t5 = self._tokens.get(prompt) or tokenize_prompt(*self.tokenizers, prompt)
        if not (clip.lost or t5.lost):  # a cut prompt is tokenized again, so that it warns each time
            self._tokens = {prompt: (clip, t5)}
        key = (clip.ids, t5.ids, in_fp32(sigmas), self.adapters)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        with staged():
            conditioning = self._made(self.t5(t5.ids), self.clip(clip.ids), sigmas)
        self._cache[key] = conditioning
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return conditioning

    def from_embeddings(
        self, txt: Tensor, pooled: Tensor, sigmas: Sequence[float], staged: Staged = nullcontext
    ) -> Conditioning:
        """From T5 embeddings `[1, N, context]` and CLIP's pooled vector `[1, vec]`, both on the device."""
        with staged():
            return self._made(txt, pooled, sigmas)

    def at(self, conditioning: Conditioning, sigmas: Sequence[float], staged: Staged = nullcontext) -> Conditioning:
        """The same text for another schedule; itself if that is its own. The latest are kept while it lives."""
        sigmas = in_fp32(sigmas)
        if sigmas == conditioning.sigmas:
            return conditioning
        known, key = self._schedules.setdefault(conditioning, OrderedDict()), (sigmas, self.adapters)
        if key not in known:
            with staged():
                table = self._table(conditioning.pooled.to(self.device), sigmas)
            known[key] = Conditioning(conditioning.txt, conditioning.pooled, sigmas, table)
            if len(known) > SCHEDULES:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key]

    @property
    def pinned_bytes(self) -> int:
        """Pinned host memory of cached prompts, as far as tensors tell."""
        tensors = (tensor for known in tuple(self._cache.values()) for tensor in (known.txt, known.modulation))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_pinned())

    def _made(self, txt: Tensor, pooled: Tensor, sigmas: Sequence[float]) -> Conditioning:
        text, vector = (self._kept(part) for part in (txt, pooled))
        return Conditioning(text, vector, in_fp32(sigmas), self._table(pooled, sigmas))

    def _table(self, pooled: Tensor, sigmas: Sequence[float]) -> Tensor:
        """The table of a schedule, of any length: `MAX_STEPS` rows at a time, which is what the plan has room for."""
        t = torch.tensor(sigmas, dtype=torch.float32, device=self.device)
        if len(t) <= MAX_STEPS:
            return self._kept(self.modulation(t, pooled))
        return torch.cat([self._kept(self.modulation(some, pooled)) for some in t.split(MAX_STEPS)])

    def _kept(self, part: Tensor) -> Tensor:
        return host_buffer(part.shape, part.dtype, self.device).copy_(part)
