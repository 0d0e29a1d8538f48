"""Judges whether memory grows from picture to picture, by a robust slope with its confidence interval."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import VortexInputError
from ..utils.packages import remedy
from .machine import machine, now
from .readings import Counters, at_rest
from .report import Report
from .samples import describe, draw
from .verdict import FAIL, PASS, UNDECIDED, Verdict
from .workload import PROMPTS

if TYPE_CHECKING:
    import torch

    from ..runtime.engine import Engine

CONFIDENCE = 0.999  # of a slope; this high because several counters are judged in each of many runs
FLOOR = 100_000  # bytes a picture; allocators settle by less, a leak of a picture's tensor is more
BOUND = 50_000_000, 10  # bytes that this many pictures in a row may add
FEWEST = 20  # pictures
MB = 1e6


@dataclass(frozen=True, slots=True)
class Trend:
    """The slope of one counter in bytes a picture, its 99.9 % interval, and the reading after each picture."""

    counter: str
    slope: float
    low: float
    high: float
    readings: tuple[int, ...]

    @property
    def growth(self) -> int:
        """The most that `BOUND[1]` pictures in a row added, in bytes."""
        span = min(BOUND[1], len(self.readings) - 1)
        return max(after - before for before, after in zip(self.readings, self.readings[span:], strict=False))

    @property
    def verdict(self) -> Verdict:
        """Fails for growth over the bound, or a slope that is above the floor with confidence."""
        bound, pictures = BOUND
        what = f"{self.counter} does not grow"
        slope = f"{self.slope / MB:+.3f} MB a picture, 99.9 % interval {self.low / MB:+.3f} to {self.high / MB:+.3f}"
        if self.low > FLOOR:
            return Verdict(what, FAIL, slope)
        if self.growth > bound:
            return Verdict(what, FAIL, f"{self.growth / MB:.1f} MB in {pictures} pictures; {slope}")
        if len(self.readings) < FEWEST:
            return Verdict(what, UNDECIDED, f"not enough pictures: {len(self.readings)} of {FEWEST}; {slope}")
        return Verdict(what, PASS, slope)


def trend(counter: str, readings: Sequence[int]) -> Trend:
    """Theil and Sen's slope: the median over all pairs, which a few jumps do not move.

    Raises `VortexInputError` for fewer than two readings.
    """
    from scipy.stats import theilslopes

    if len(readings) < 2:
        raise VortexInputError(f"A slope needs at least two pictures, not {len(readings)}.")
    slope, _, low, high = theilslopes(readings, alpha=CONFIDENCE)
    return Trend(counter, float(slope), float(low), float(high), tuple(readings))


@dataclass(frozen=True, slots=True)
class LeakReport(Report):
    """A trend for each counter."""

    schema: ClassVar[str] = "vortex.bench.leak/1"
    sizes: tuple[tuple[int, int], ...]
    trends: tuple[Trend, ...]
    interrupted: bool

    @property
    def words(self) -> str:
        """How many pictures of which sizes."""
        sizes = ", ".join(f"{width} x {height}" for width, height in self.sizes)
        return f"{len(self.trends[0].readings)} pictures of {sizes}"

    @property
    def verdicts(self) -> list[Verdict]:
        """One a counter."""
        return [trend.verdict for trend in self.trends]

    def measured(self) -> dict[str, Any]:
        """Everything."""
        return {
            "sizes": self.sizes,
            "trends": [asdict(trend) | {"growth": trend.growth} for trend in self.trends],
            "interrupted": self.interrupted,
        }


def mixed(side: int) -> list[tuple[int, int]]:
    """Sizes to draw in turn for a model whose native side is `side`: native, half of it, and wide."""
    return [(side, side), (side // 2, side // 2), (side, side // 2)]


def run(
    engine: Engine,
    sizes: Sequence[tuple[int, int]],
    pictures: int,
    *,
    read: Callable[[torch.device], Counters] = at_rest,
    on_picture: Callable[[int, int], None] | None = None,
    **options: Any,
) -> LeakReport:
    """Draw `pictures` pictures of `sizes` (width, height) in turn and `read` the counters after each.

    Two rounds of all sizes and prompts come first and do not count: caches fill, allocators settle. Ctrl-C ends the
    check early and keeps what was measured. `options` go to `Engine.generate`.
    """
    if not any(value is not None for value in read(engine.device).values()):
        raise VortexInputError(f"No counter of memory can be read here. Try `{remedy('psutil')}`: it tells the host's.")
    when = now()
    settle = 2 * max(len(sizes), len(PROMPTS))
    readings: dict[str, list[int]] = {}
    interrupted = False
    gc.collect()
    gc.freeze()  # so that the collections below skip what was there before
    try:
        for i in range(settle + pictures):
            width, height = sizes[i % len(sizes)]
            draw(engine, PROMPTS[i % len(PROMPTS)], i, width=width, height=height, **options)
            gc.collect()  # a cycle that would be collected later is no leak
            if i >= settle:
                for name, value in read(engine.device).items():
                    if value is not None:
                        readings.setdefault(name, []).append(value)
            if on_picture is not None:
                on_picture(i + 1, settle + pictures)
    except KeyboardInterrupt:
        if not readings:
            raise
        interrupted = True
    finally:
        gc.unfreeze()
    trends = tuple(trend(name, values) for name, values in readings.items())
    return LeakReport(describe(engine), machine(engine.device), when, tuple(sizes), trends, interrupted)
