"""Feature maps as strips of rows in one block of memory: the same picture is decoded in a quarter of the memory.

Independent tiles would be visible: they change the statistics of every GroupNorm and cut the mid block's attention.
Here a norm takes its statistics over the whole map before it is applied, and a convolution sees the rows above and
below its strip. So the height of the strips changes nothing but the order of sums.

No map is allocated. `DecoderLayout` computes where each strip lies: it may overwrite what has been read by then. So
about one map is in memory at a time, and the bytes that a decode takes are a sum. Maps have their channels last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels import Moments, Window, most_parts
from ..memory.arena import Region, Shape, aligned, laid_out
from .spec import VaeSpec

Span = tuple[int, int]  # a strip's first byte in the memory, and the byte after its last


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
class DecoderLayout:
    """Where everything lies in the memory for decoding one picture, and so how many bytes that takes.

    `height`, `width`: those of the latents. Maps are cut into strips of at most `rows`; None: one strip. A level's maps
    lie just so low that its output, the next level's arrival, overwrites nothing that is still to be read.
    """

    spec: VaeSpec
    height: int
    width: int
    rows: int | None
    dtype: torch.dtype

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
        """Where attention's four matrices `[h w, C]` begin: behind the lowest level's maps."""
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

    @cached_property
    def buffers(self) -> tuple[Shape, ...]:
        """Shapes and types of what lies behind the maps, in order; see `DecoderMemory`."""
        widest = max(self.spec.channels)
        return (
            ((self.bordered,), self.dtype),
            ((16 * widest * widest,), self.dtype),
            ((3, self.spec.groups, self.parts), torch.float32),
            ((2 * widest,), torch.float32),
            ((self.row,), self.dtype),
            ((self.row,), self.dtype),
            ((1, self.spec.latent_channels, self.height, self.width), self.dtype),
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return aligned(self.maps_bytes) + laid_out(self.buffers)


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _start(level: Level, above: Level) -> int:
    """The least `start` of `level` with which its output for the level above overwrites nothing before it is read."""
    needs = [0]
    for j, source in enumerate(above.sources):
        if source + 1 < len(level.heights):  # a strip is copied with its border before its output is written
            needs.append(above.arrival(j)[1] - level.residual(source + 1)[0])
    return aligned(max(needs))


@dataclass(slots=True)
class Map:
    """Strips `[1, C, rows, W]` of a feature map, and its moments if they were computed while it was written.

    The moments of the next map overwrite these.
    """

    strips: Sequence[Tensor]
    moments: Moments | None = None


class DecoderMemory:
    """The layout's tensors in a block of memory, for one picture after the other."""

    def __init__(self, layout: DecoderLayout, memory: Tensor) -> None:
        """`memory`: uint8, one dimension, of at least `layout.nbytes`. Raises `ValueError` where it is smaller."""
        if memory.numel() < layout.nbytes:
            raise ValueError(f"Decoding takes {layout.nbytes} bytes of memory; these are {memory.numel()}.")
        self.layout, self._memory = layout, memory
        region = Region(memory, aligned(layout.maps_bytes))
        self._bordered, self._taps, self._moments, self._terms, *self._rows, self.latent = (
            region.take(shape, dtype) for shape, dtype in layout.buffers
        )

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

    def matrices(self) -> list[Tensor]:
        """Attention's four matrices, each `[h w, C]`."""
        level, region = self.layout.levels[0], Region(self._memory, self.layout.attention)
        return [region.take((self.layout.height * level.width, level.channels), self.layout.dtype) for _ in range(4)]

    def bordered(self, channels: int, height: int, width: int) -> Tensor:
        """A strip of that size with a border, `[1, C, h + 2, w + 2]`, uninitialized."""
        return _channels_last(self._bordered, channels, height + 2, width + 2)

    def taps(self, weight: Tensor) -> Tensor:
        """For `kernels.corner_taps` of a weight: `[4 N, 4 C]`, uninitialized."""
        wide, channels = weight.shape[:2]
        return self._taps[: 16 * wide * channels].view(4 * wide, 4 * channels)

    def moments(self) -> Moments:
        """Empty moments for the next map; they overwrite those of the map before."""
        return Moments(self._moments)

    def terms(self, channels: int) -> Tensor:
        """For `kernels.norm_terms`: `[2, C]`, uninitialized."""
        return self._terms[: 2 * channels].view(2, channels)

    def windows(self, strips: Sequence[Tensor], *, overwritten: bool = False) -> Iterator[Window]:
        """Strips with their neighbours' rows, from top to bottom.

        `overwritten`: a strip's memory, up to the next strip, may be overwritten as soon as that strip is done.
        """
        above = None
        for i, strip in enumerate(strips):
            below = strips[i + 1][:, :, :1] if i + 1 < len(strips) else None
            last = strip[:, :, -1:]
            if overwritten and below is not None:
                last = _channels_last(self._rows[i % 2], strip.shape[1], 1, strip.shape[3]).copy_(last)
            yield Window(above, strip, below)
            above = last

    def _map(self, channels: int, level: Level, spans: list[Span]) -> Map:
        strips = []
        for rows, (begin, end) in zip(level.heights, spans, strict=True):
            strips.append(_channels_last(self._memory[begin:end].view(self.layout.dtype), channels, rows, level.width))
        return Map(strips)


def _channels_last(flat: Tensor, channels: int, height: int, width: int) -> Tensor:
    """`[1, C, h, w]` at the start of `flat`."""
    return flat[: channels * height * width].view(1, height, width, channels).permute(0, 3, 1, 2)
