"""Where the decoder's feature maps lie: the same picture is decoded in a quarter of the memory.

A strip may overwrite what has been read by then, also a strip of the same level. So about one map is in memory at a
time. flux1/strip_memory.py says how strips work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from ..kernels import most_parts
from ..memory.arena import Shape, aligned
from .strip_memory import Map, Span, StripLayout, StripMemory


@dataclass(frozen=True)
class Level:
    """One resolution: where the strips of its maps lie, counted from the top.

    Blocks compute between two maps of `channels`: `residual` and `other`. The map from the level below, `arrival`, has
    `arriving` channels; where `arriving` equals `channels`, it lies where the residual map does.
    """

    arriving: int
    channels: int
    width: int
    itemsize: int
    heights: tuple[int, ...]  # of the strips
    sources: tuple[int, ...] = ()  # for each strip, the strip of the level below that it is made of
    start: int = 0  # of the first map

    @property
    def widens(self) -> bool:
        """Whether its first block changes the number of channels."""
        return self.arriving != self.channels

    @cached_property
    def shift(self) -> int:
        """Bytes from `start` to the arrival, which the first block reads and overwrites.

        A strip of it is read for the last time when the shortcut is written to the residual map. From then on the
        other map may overwrite it, but not the strip below.
        """
        plain = replace(self, start=0)
        begins = [plain._strip(self.arriving, i)[0] for i in range(len(self.heights))]
        needs = [plain.residual(i)[1] - begin for i, begin in enumerate(begins)]
        needs += [plain.other(i)[1] - begin for i, begin in enumerate(begins[1:])]
        return aligned(max(0, *needs))

    def arrival(self, i: int) -> Span:
        """Where strip `i` of the arrival lies."""
        if not self.widens:
            return self.residual(i)
        return _moved(self._strip(self.arriving, i), self.start + self.shift)

    def residual(self, i: int) -> Span:
        """Where strip `i` of the residual map lies: behind the whole other map, or before strip `i` of it."""
        begin, end = self._strip(self.channels, i)
        if self.widens:
            return _moved((begin, end), self.start + begin)
        return _moved((begin, end), self.start + aligned(self.map_bytes))

    def other(self, i: int) -> Span:
        """Where strip `i` of the other map lies."""
        begin, end = self._strip(self.channels, i)
        return _moved((begin, end), self.start + (end if self.widens else 0))

    @property
    def map_bytes(self) -> int:
        """Bytes of one map."""
        return self._strip(self.channels, len(self.heights) - 1)[1]

    @property
    def end(self) -> int:
        """The byte behind all of its maps."""
        last = len(self.heights) - 1
        return max(self.residual(last)[1], self.other(last)[1], self.arrival(last)[1])

    @cached_property
    def _tops(self) -> tuple[int, ...]:
        return tuple(accumulate(self.heights, initial=0))

    def _strip(self, channels: int, i: int) -> Span:
        """Where strip `i` begins and ends in its map."""
        row = self.width * channels * self.itemsize
        return self._tops[i] * row, self._tops[i + 1] * row


@dataclass(frozen=True)
class DecoderLayout(StripLayout):
    """The decoder's layout. A level's maps lie just so low that its output, the next level's arrival, overwrites
    nothing that is still to be read.
    """

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """All levels; the lowest resolution is the first and runs first."""
        channels = self.spec.channels[::-1]
        most = self.rows or self.height
        heights = tuple(min(most, self.height - top) for top in range(0, self.height, most))
        levels = [Level(channels[0], channels[0], self.width, self.dtype.itemsize, heights)]
        for wide in channels[1:]:
            below = levels[-1]
            heights, sources = self._doubled(below.heights)
            levels.append(Level(below.channels, wide, 2 * below.width, self.dtype.itemsize, heights, sources))
        for k in reversed(range(len(levels) - 1)):
            levels[k] = replace(levels[k], start=_start(levels[k], levels[k + 1]))
        return tuple(levels)

    def _doubled(self, heights: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Heights of the strips one level up, and for each the strip that it is made of."""
        doubled, sources = [], []
        for i, height in enumerate(heights):
            cut = self.rows is not None and 2 * height > self.rows and height > 1
            parts = ((height + 1) // 2, height // 2) if cut else (height,)
            doubled += [2 * part for part in parts]
            sources += [i] * len(parts)
        return tuple(doubled), tuple(sources)

    @property
    def attention(self) -> int:
        """Behind the lowest level's maps."""
        return aligned(self.levels[0].end)

    @cached_property
    def maps_bytes(self) -> int:
        """Bytes of all maps, and of attention's matrices."""
        matrices = 4 * aligned(self.levels[0].map_bytes)
        return max(self.attention + matrices, *(level.end for level in self.levels))

    @cached_property
    def bordered(self) -> int:
        """Values of the largest strip that a convolution reads, with its border."""
        strips = [(self.height, self.levels[0])]  # the lowest map is also taken whole
        strips += [(max(level.heights), level) for level in self.levels]
        return max((rows + 2) * (level.width + 2) * max(level.arriving, level.channels) for rows, level in strips)

    @cached_property
    def row(self) -> int:
        """Values of the longest row that is copied before its strip is overwritten."""
        return max(level.width * max(level.arriving, level.channels) for level in self.levels)

    @cached_property
    def parts(self) -> int:
        """The most parts that the moments of a map have."""
        lowest, *above = self.levels
        counts = [most_parts(lowest.channels, self.height, self.width)]
        for level in self.levels:
            counts.append(sum(most_parts(level.channels, rows, level.width) for rows in level.heights))
        for level in above:
            found = (most_parts(level.arriving, rows, level.width, doubled=True) for rows in level.heights)
            counts.append(sum(found))
        return max(counts)

    @property
    def own(self) -> tuple[Shape, ...]:
        """The doubled convolutions' taps, and the latent."""
        latent = (1, self.spec.latent_channels, self.height, self.width)
        return ((16 * max(self.spec.channels) ** 2,), self.dtype), (latent, self.dtype)


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _start(level: Level, above: Level) -> int:
    """The least `start` of `level` with which its output for the level above overwrites nothing before it is read."""
    needs = [0]
    for j, source in enumerate(above.sources):
        if source + 1 < len(level.heights):  # a strip is copied with its border before its output is written
            needs.append(above.arrival(j)[1] - level.residual(source + 1)[0])
    return aligned(max(needs))


class DecoderMemory(StripMemory):
    """The decoder's maps, for one picture after the other."""

    def __init__(self, layout: DecoderLayout, memory: Tensor) -> None:
        """See `StripMemory`."""
        super().__init__(layout, memory)
        self.layout = layout
        self._taps, self.latent = self.own

    def arrival(self, k: int) -> Map:
        """The map that level `k` gets from the level below."""
        level = self.layout.levels[k]
        return self._map(level.arriving, level, [level.arrival(i) for i in range(len(level.heights))])

    def residual(self, k: int) -> Map:
        """The map of level `k` that its blocks add to."""
        level = self.layout.levels[k]
        return self._map(level.channels, level, [level.residual(i) for i in range(len(level.heights))])

    def other(self, k: int, channels: int | None = None) -> Map:
        """The map of level `k` between a block's convolutions; or one of fewer `channels` in its place."""
        level = self.layout.levels[k]
        return self._map(channels or level.channels, level, [level.other(i) for i in range(len(level.heights))])

    def lowest(self) -> tuple[Map, Map]:
        """The two maps of the lowest level, each as one strip."""
        level = self.layout.levels[0]
        whole = replace(level, heights=(self.layout.height,))
        return self._map(level.channels, whole, [whole.residual(0)]), self._map(level.channels, whole, [whole.other(0)])

    def taps(self, weight: Tensor) -> Tensor:
        """For `kernels.corner_taps` of a weight: `[4 N, 4 C]`, uninitialized."""
        wide, channels = weight.shape[:2]
        return self._taps[: 16 * wide * channels].view(4 * wide, 4 * channels)

    def _map(self, channels: int, level: Level, spans: list[Span]) -> Map:
        sized = zip(level.heights, spans, strict=True)
        return Map([self.at(span, channels, rows, level.width) for rows, span in sized])
