"""How long something takes: synchronized timing, and percentiles that say how many samples they rest on.

A percentile is by nearest rank, so it is always a time that was measured. Beyond P90 a small run says little:
`support` counts the samples at or above it, and a P99.9 of 20 runs is simply the slowest of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
OUTLIER_SIGMAS = 3


@dataclass(frozen=True, slots=True)
class Percentile:
    """`q` percent of the samples took at most `seconds`; `support` samples took that long or longer."""

    q: float
    seconds: float
    support: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Statistics of `count` samples in seconds. `outliers` are `(index, seconds)` beyond 3 sigma of the mean."""

    count: int
    mean: float
    deviation: float
    minimum: float
    maximum: float
    percentiles: tuple[Percentile, ...]
    outliers: tuple[tuple[int, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def summarize(samples: Sequence[float]) -> Latency:
    """Statistics of at least one sample. Raises `ValueError` for none, or one that is no finite number from 0."""
    if not samples:
        raise ValueError("There is nothing to summarize: no sample was taken.")
    if not all(math.isfinite(sample) and sample >= 0 for sample in samples):
        raise ValueError(f"Samples must be finite seconds from 0, not {list(samples)}.")
    mean = statistics.fmean(samples)
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    far = OUTLIER_SIGMAS * deviation
    return Latency(
        count=len(samples),
        mean=mean,
        deviation=deviation,
        minimum=min(samples),
        maximum=max(samples),
        percentiles=tuple(percentile(samples, q) for q in PERCENTILES),
        outliers=tuple((i, sample) for i, sample in enumerate(samples) if far and abs(sample - mean) > far),
    )


def percentile(samples: Sequence[float], q: float) -> Percentile:
    """The nearest-rank percentile, `q` above 0 and up to 100."""
    ordered = sorted(samples)
    # rounded, or the 99.9 % of 1000 samples would be rank 1000: 0.999 is not exact in binary
    rank = max(1, math.ceil(round(q * len(ordered) / 100, 6)))
    return Percentile(q, ordered[rank - 1], len(ordered) - rank + 1)


def measure(
    work: Callable[[], object],
    *,
    runs: int,
    warmup: int,
    device: torch.device,
    on_run: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Seconds of each of `runs` calls of `work`, after `warmup` calls that do not count.

    The device is synchronized before and after each call. `on_run(done, total)` is told of every call outside the
    timed span, warm-up included; it may raise to cancel.
    """
    samples: list[float] = []
    for i in range(warmup + runs):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        elapsed = time.perf_counter() - started
        if i >= warmup:
            samples.append(elapsed)
        if on_run is not None:
            on_run(i + 1, warmup + runs)
    return samples


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
