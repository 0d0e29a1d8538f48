"""Where the encoder's feature maps lie, each whole: the largest level's two take most of the memory.

Levels get smaller, so that a level's maps fit where those of the level above have been read. Strips bound what a
convolution reads at once; flux1/strip_memory.py says how they work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..kernels import most_parts
from ..memory.arena import Shape, aligned
from .strip_memory import Map, Span, StripLayout, StripMemory, channels_last

COLOURS = 3


@dataclass(frozen=True, slots=True)
class EncoderLevel:
    """One resolution and where its maps lie. Blocks compute between two maps of `channels`, `residual` and `other`.

    `arrival` has `arriving` channels; where these equal `channels`, it is the residual map.
    """

    arriving: int
    channels: int
    height: int
    width: int
    arrival: Span
    residual: Span
    other: Span


@dataclass(frozen=True)
class EncoderLayout(StripLayout):
    """The encoder's layout. `rows` are those of a strip at each level, rounded up to an even number."""

    @cached_property
    def levels(self) -> tuple[EncoderLevel, ...]:
        """All levels; the first has the picture's own resolution and runs first."""
        levels: list[EncoderLevel] = []
        arriving = self.spec.channels[0]
        for k, channels in enumerate(self.spec.channels):
            height, width = self.height << (3 - k), self.width << (3 - k)
            pixels = height * width * self.dtype.itemsize
            arrival = residual = _first_free(pixels * arriving, (above.residual for above in levels[-1:]))
            if arriving != channels:
                residual = _first_free(pixels * channels, (arrival,))
            other = _first_free(pixels * channels, (arrival, residual))
            levels.append(EncoderLevel(arriving, channels, height, width, arrival, residual, other))
            arriving = channels
        return tuple(levels)

    def cut(self, height: int) -> int:
        """Rows of a strip of a map of this height. Even, since two rows become one on the way down."""
        return height if self.rows is None else min(height, self.rows + self.rows % 2)

    @cached_property
    def attention(self) -> int:
        """Behind the lowest level's maps."""
        lowest = self.levels[-1]
        return aligned(max(lowest.residual[1], lowest.other[1]))

    @cached_property
    def maps_bytes(self) -> int:
        """Bytes of all maps, and of attention's matrices."""
        begin, end = self.levels[-1].other
        ends = (span[1] for level in self.levels for span in (level.arrival, level.residual, level.other))
        return max(self.attention + 4 * aligned(end - begin), *ends)

    @cached_property
    def bordered(self) -> int:
        """Values of the largest strip that a convolution reads, with its border."""
        lowest = self.levels[-1]  # which is also taken whole
        sizes = [(lowest.height, lowest), *((self.cut(level.height), level) for level in self.levels)]
        return max((rows + 2) * (level.width + 2) * max(level.arriving, level.channels) for rows, level in sizes)

    @cached_property
    def row(self) -> int:
        """Values of the longest row that is copied before its strip is overwritten."""
        return max(level.width * max(level.arriving, level.channels) for level in self.levels)

    @cached_property
    def parts(self) -> int:
        """The most parts that the moments of a map have."""
        counts = [most_parts(self.levels[-1].channels, self.height, self.width)]
        for level in self.levels:
            rows = self.cut(level.height)
            heights = [min(rows, level.height - top) for top in range(0, level.height, rows)]
            for channels in (level.arriving, level.channels):
                counts.append(sum(most_parts(channels, height, level.width) for height in heights))
        return max(counts)

    @property
    def own(self) -> tuple[Shape, ...]:
        """The picture with its border, and the latent."""
        picture = (self.height * 8 + 2) * (self.width * 8 + 2) * COLOURS
        latent = self.spec.latent_channels * self.height * self.width
        return ((picture,), self.dtype), ((latent,), self.dtype)


def _first_free(size: int, taken: Iterable[Span]) -> Span:
    """The first place of `size` bytes that overlaps none of `taken`."""
    begin = 0
    for start, end in sorted(taken):
        if begin + size <= start:
            break
        begin = max(begin, aligned(end))
    return begin, begin + size


class EncoderMemory(StripMemory):
    """The encoder's maps, for one picture after the other. `picture` has a border of zeros."""

    def __init__(self, layout: EncoderLayout, memory: Tensor) -> None:
        """See `StripMemory`."""
        super().__init__(layout, memory)
        self.layout = layout
        picture, latent = self.own
        self.picture = channels_last(picture, COLOURS, layout.height * 8 + 2, layout.width * 8 + 2)
        self.latent = channels_last(latent, layout.spec.latent_channels, layout.height, layout.width)
        self.picture.zero_()

    def arrival(self, k: int) -> Map:
        """The map that level `k` gets from the level above."""
        level = self.layout.levels[k]
        return self._map(level, level.arrival, level.arriving)

    def entry(self, k: int) -> Tensor:
        """The arrival of level `k` as one tensor, to be written."""
        level = self.layout.levels[k]
        return self.at(level.arrival, level.arriving, level.height, level.width)

    def residual(self, k: int) -> Map:
        """The map of level `k` that its blocks add to."""
        level = self.layout.levels[k]
        return self._map(level, level.residual, level.channels)

    def other(self, k: int) -> Map:
        """The map of level `k` between a block's convolutions."""
        level = self.layout.levels[k]
        return self._map(level, level.other, level.channels)

    def lowest(self) -> tuple[Map, Map]:
        """The two maps of the lowest level, each as one strip."""
        level = self.layout.levels[-1]
        whole = (self.at(span, level.channels, level.height, level.width) for span in (level.residual, level.other))
        residual, other = (Map([strip]) for strip in whole)
        return residual, other

    def cornered(self, channels: int, height: int, width: int) -> Tensor:
        """A strip of that size with a border below and to the right, `[1, C, h + 1, w + 1]`, uninitialized."""
        return channels_last(self._bordered, channels, height + 1, width + 1)

    def _map(self, level: EncoderLevel, span: Span, channels: int) -> Map:
        return Map(self.at(span, channels, level.height, level.width).split(self.layout.cut(level.height), dim=2))
