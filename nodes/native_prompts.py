"""What an engine makes of the host's conditioning: for each row of a batch, a timestep and a `Conditioning`.

The modulation of all steps of a sampling is computed in one pass, when its first step comes: the host tells them in
`sample_sigmas`. Timesteps that samplers add between them are computed when they come.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..vortex_core import Engine
    from ..vortex_core.flux1.conditioning import Conditioning
    from .native_route import Call

PROMPTS = 8  # that are kept
BETWEEN = 16  # timesteps of a prompt that are kept, besides those of its schedule
Loras = tuple[tuple[Any, float], ...]
Row = tuple[float, "Conditioning"]
Guard = Callable[[], AbstractContextManager[None]]


@dataclass(slots=True, eq=False)
class Prompt:
    """A text, in host memory, and what the engine made of it with these LoRAs."""

    txt: Tensor  # [1, N, context]
    pooled: Tensor  # [1, vec]
    loras: Loras
    scheduled: Conditioning
    between: OrderedDict[float, Conditioning] = field(default_factory=OrderedDict)

    def fits(self, txt: Tensor, pooled: Tensor, loras: Loras) -> bool:
        """Whether it is the same text with the same LoRAs, by content."""
        import torch

        return _same(loras, self.loras) and torch.equal(pooled, self.pooled) and torch.equal(txt, self.txt)

    def at(self, t: float) -> Conditioning | None:
        """Its conditioning for a timestep, if that is known."""
        return self.scheduled if t in self.scheduled.sigmas else self.between.get(t)


def _same(some: Loras, others: Loras) -> bool:
    return [(id(file), strength) for file, strength in some] == [(id(file), strength) for file, strength in others]


class Prompts:
    """The latest prompts of an engine."""

    def __init__(self) -> None:
        self._latest: list[Prompt] = []  # the latest first

    def forget(self) -> None:
        """Drop all: they are of an engine that is gone."""
        self._latest.clear()

    def rows(self, engine: Engine, call: Call, schedule: list[float], loras: Loras) -> list[Row] | None:
        """The timestep and the conditioning of each row; None where a timestep is none of a flow's.

        Rows of the same text and time have the same conditioning. `schedule`: the timesteps of the whole sampling.
        """
        import torch

        times = call.given["timestep"].tolist()
        if not all(0 <= t <= 1 for t in times):
            return None
        width, dtype = engine.spec.flux.vec, engine.dtype
        texts, pooled = call.given["context"].to("cpu", dtype), call.given.get("y")
        vectors = torch.zeros(len(texts), width, dtype=dtype) if pooled is None else pooled[:, :width].to("cpu", dtype)
        every = zip(times, texts.split(1), vectors.split(1), strict=True)
        return [(t, self.of(engine, (txt, vector), t, schedule, loras)) for t, txt, vector in every]

    def of(
        self, engine: Engine, text: tuple[Tensor, Tensor], t: float, schedule: list[float], loras: Loras
    ) -> Conditioning:
        """The conditioning of T5's `[1, N, context]` and CLIP's `[1, vec]` for a timestep, of any type and device."""
        text = (text[0].to("cpu", engine.dtype), text[1][:, : engine.spec.flux.vec].to("cpu", engine.dtype))
        prompt = next((known for known in self._latest if known.fits(*text, loras)), None)
        if prompt is None:
            txt, pooled = (part.clone() for part in text)
            wanted = tuple(dict.fromkeys(schedule if t in schedule else [*schedule, t]))
            prompt = Prompt(txt, pooled, loras, engine.condition(txt, pooled, loras=loras, sigmas=wanted))
        else:
            self._latest.remove(prompt)
        self._latest.insert(0, prompt)
        del self._latest[PROMPTS:]
        if (known := prompt.at(t)) is not None:
            return known
        if t in schedule:  # of another sampling
            prompt.scheduled = engine.schedule(prompt.scheduled, tuple(dict.fromkeys(schedule)), loras)
            return prompt.scheduled
        prompt.between[t] = engine.schedule(prompt.scheduled, (t,), loras)
        if len(prompt.between) > BETWEEN:
            prompt.between.popitem(last=False)
        return prompt.between[t]


def schedule_of(model: Any, call: Call) -> list[float]:
    """The timesteps of the whole sampling, in fp32 as the host's `model` gives them; none where it does not tell."""
    sigmas = call.options.get("sample_sigmas")
    if sigmas is None:
        return []
    times = model.model_sampling.timestep(sigmas.cpu()).float().tolist()
    return [t for t in times[:-1] if 0 <= t <= 1]
