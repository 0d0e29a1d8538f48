"""Synchronized timing by phase, and percentiles that say how many samples support them.

Code that draws calls `mark` where a phase ends. A percentile is by nearest rank, so it is always a time that was
measured. Beyond P90 a small run says little: `support` counts the samples at or above it, and a P99.9 of 20 runs is
simply the slowest of them.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
OUTLIER_SIGMAS = 3
CONFIDENCE = 0.95

_running: ContextVar[Stopwatch | None] = ContextVar("vortex_stopwatch", default=None)


def mark(phase: str) -> None:
    """Count the time since the last mark, or since the start, as `phase`. Does nothing outside a `Stopwatch`."""
    watch = _running.get()
    if watch is not None:
        watch.mark(phase)


class Stopwatch:
    """Times what runs inside `with` by the host's clock, and its phases. The device is synchronized at both ends.

    On CUDA, events in the current stream time the phases, so work counts in the phase that launched it. Afterwards:
    `seconds`; `phases`, seconds by name, in order; `unmarked`, the seconds by which the host's clock exceeds their sum:
    work after the last mark, or on another stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now, self._between = _clock(device)
        self._marks: list[tuple[str, Any]] = []
        self.phases: dict[str, float] = {}
        self.seconds = self.unmarked = 0.0

    def mark(self, phase: str) -> None:
        """See `mark` of this module."""
        self._marks.append((phase, self._now()))

    def __enter__(self) -> Stopwatch:
        synchronize(self._device)
        self._token = _running.set(self)
        self._started = time.perf_counter()
        self._first = self._now()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        _running.reset(self._token)
        if kind is not None:
            return
        synchronize(self._device)
        self.seconds = time.perf_counter() - self._started
        before = self._first
        for phase, at in self._marks:
            self.phases[phase] = self.phases.get(phase, 0.0) + self._between(before, at)
            before = at
        self.unmarked = self.seconds - sum(self.phases.values())


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """A function that records a moment, and one that gives the seconds between two moments."""
    if device.type != "cuda":
        return time.perf_counter, lambda before, after: after - before

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return now, lambda before, after: before.elapsed_time(after) / 1e3


@dataclass(frozen=True, slots=True)
class Percentile:
    """`q` percent of the samples took at most `seconds`; `support` samples took that long or longer.

    `low` to `high` is its 95 % bootstrap interval. `supported`: there are `samples_needed(q)` samples; with fewer,
    `seconds` is little more than the slowest sample.
    """

    q: float
    seconds: float
    support: int
    low: float
    high: float
    supported: bool


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

    def percentile(self, q: float) -> Percentile:
        """One of `PERCENTILES`."""
        return next(p for p in self.percentiles if p.q == q)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def summarize(samples: Sequence[float]) -> Latency:
    """Statistics of samples in seconds. Raises `ValueError` for no sample, or one that is negative or not finite."""
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
    """The nearest-rank percentile, `q` above 0 and below 100."""
    ordered = sorted(samples)
    count = len(ordered)
    # rounded: 0.999 is not exact in binary, and the 99.9 % of 1000 samples would be rank 1000
    rank = max(1, math.ceil(round(q * count / 100, 6)))
    # A resample's percentile is at most the j-th sample if at least `rank` of its draws are. The share of resamples
    # where that holds is a binomial tail, so none has to be drawn.
    tail = (1 - CONFIDENCE) / 2
    low, high = (
        ordered[bisect_left(range(1, count + 1), share, key=lambda j: _tail(rank, count, j / count))]
        for share in (tail, 1 - tail)
    )
    return Percentile(
        q=q,
        seconds=float(ordered[rank - 1]),
        support=count - rank + 1,
        low=float(low),
        high=float(high),
        supported=count >= samples_needed(q),
    )


def _tail(least: int, draws: int, chance: float) -> float:
    """The probability that `least` or more of `draws` hit, each with this `chance` above 0: the binomial tail."""
    if chance >= 1:
        return 1.0
    hit, miss, ways = math.log(chance), math.log1p(-chance), math.lgamma(draws + 1)
    return math.fsum(
        math.exp(ways - math.lgamma(k + 1) - math.lgamma(draws - k + 1) + k * hit + (draws - k) * miss)
        for k in range(least, draws + 1)
    )


def samples_needed(q: float) -> int:
    """Samples needed for 95 % confidence that one lies beyond the true percentile: 59 for P95, 299 for P99."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(q / 100))
