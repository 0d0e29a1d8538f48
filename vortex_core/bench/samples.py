"""Draws pictures to time them, and keeps what each took."""

from __future__ import annotations

import math
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import GB
from ..utils.timing import Stopwatch, mark
from .machine import Reading, gauge
from .workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..runtime.engine import Engine

FEWEST = 5  # pictures, however long they take


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture: `seconds` on the host's clock, `phases` by name on the device's, the machine right after it.

    `started` is in seconds since the run began; `cold`: its prompt was new.
    """

    index: int
    cold: bool
    prompt: str
    seed: int
    started: float
    seconds: float
    phases: dict[str, float]
    unmarked: float
    reading: Reading


def describe(engine: Engine) -> dict[str, str]:
    """The model and how it runs."""
    return {
        "name": engine.name,
        "quantization": engine.quantization,
        "mode": engine.mode,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": engine.device.type,
        "vram_budget": "none" if engine.budget is None else f"{engine.budget / GB:g} GB",
    }


def draw(engine: Engine, prompt: str, seed: int, **options: Any) -> Tensor:
    """One picture, copied out to host memory. `options` go to `Engine.generate`."""
    picture = engine.generate(prompt, seed=seed, **options).cpu()
    mark("copy out")
    return picture


def measure(
    engine: Engine,
    workload: Workload,
    on_picture: Callable[[int, int], None] | None = None,
    *,
    patience: float = math.inf,
    **options: Any,
) -> Iterator[Sample]:
    """Draw the workload, and yield each picture that counts once it is drawn. `options` go to `Engine.generate`.

    After `patience` seconds, and `FEWEST` pictures of cached prompts, the rest of those is left out.
    `on_picture(done, total)` is called after every picture, warm-up included, outside the timed span. It may raise to
    cancel.
    """
    read = gauge(engine.device)
    options |= {"width": workload.width, "height": workload.height, "steps": workload.steps}
    begun = time.perf_counter()
    for prompt in workload.prompts:
        engine.encode(prompt, workload.steps, options.get("loras"))  # from now on it is cached
    for i in range(workload.total):
        index = i - workload.warmup
        cold = index >= workload.iterations
        if not cold and index >= FEWEST and time.perf_counter() - begun > patience:
            continue
        prompt = workload.prompts[i % len(workload.prompts)]
        if cold:
            prompt = f"{prompt}, {secrets.token_hex(4)}"
        started = time.perf_counter() - begun
        with Stopwatch(engine.device) as watch:
            draw(engine, prompt, i, **options)
        if index >= 0:
            yield Sample(index, cold, prompt, i, started, watch.seconds, watch.phases, watch.unmarked, read())
        if on_picture is not None:
            on_picture(i + 1, workload.total)


def overhead(sample: Sample, device: torch.device, repeats: int = 200) -> float:
    """Seconds that the stopwatch adds to a picture with the phases of `sample`: the median of `repeats` empty runs."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        with Stopwatch(device):
            for phase in sample.phases:
                mark(phase)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
