"""Feature maps as strips of rows in one block of memory: a picture is coded in a fraction of the memory.

Independent tiles would be visible: they change the statistics of every GroupNorm and cut the mid block's attention.
Here a norm takes its statistics over the whole map before it is applied, and a convolution sees the rows above and
below its strip. So the height of the strips changes nothing but the order of sums.

No map is allocated. A layout computes where each one lies: it may overwrite what has been read by then. So the bytes
that coding takes are a sum. Maps have their channels last. flux1/decoder_memory.py has the layout of the VAE's decoder,
flux1/encoder_memory.py that of its encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels import Moments, Window
from ..memory.arena import Region, Shape, aligned, laid_out
from .spec import VaeSpec

Span = tuple[int, int]  # the first byte of a map or a strip in the memory, and the byte after its last


@dataclass(frozen=True)
class StripLayout(ABC):
    """Where everything lies in the memory for coding one picture, and so how many bytes that takes.

    `height`, `width`: those of the latents. Maps are cut into strips of at most `rows`; None: one strip.
    """

    spec: VaeSpec
    height: int
    width: int
    rows: int | None
    dtype: torch.dtype

    @property
    @abstractmethod
    def attention(self) -> int:
        """Where attention's four matrices `[h w, C]` begin."""

    @property
    @abstractmethod
    def maps_bytes(self) -> int:
        """Bytes of all maps, and of attention's matrices."""

    @property
    @abstractmethod
    def bordered(self) -> int:
        """Values of the largest strip that a convolution reads, with its border."""

    @property
    @abstractmethod
    def row(self) -> int:
        """Values of the longest row that is copied before its strip is overwritten."""

    @property
    @abstractmethod
    def parts(self) -> int:
        """The most parts that the moments of a map have."""

    @property
    @abstractmethod
    def own(self) -> tuple[Shape, ...]:
        """Shapes and types of what only this half of the VAE needs behind its maps."""

    @cached_property
    def buffers(self) -> tuple[Shape, ...]:
        """Shapes and types of what lies behind the maps, in order; see `StripMemory`."""
        return (
            ((self.bordered,), self.dtype),
            ((3, self.spec.groups, self.parts), torch.float32),
            ((2 * max(self.spec.channels),), torch.float32),
            ((self.row,), self.dtype),
            ((self.row,), self.dtype),
            *self.own,
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return aligned(self.maps_bytes) + laid_out(self.buffers)


@dataclass(slots=True)
class Map:
    """Strips `[1, C, rows, W]` of a feature map, and its moments if they were computed while it was written.

    The moments of the next map overwrite these.
    """

    strips: Sequence[Tensor]
    moments: Moments | None = None


class StripMemory:
    """The layout's tensors in a block of memory, for one picture after the other. `own`: those of `StripLayout.own`."""

    def __init__(self, layout: StripLayout, memory: Tensor) -> None:
        """`memory`: uint8, one dimension, of at least `layout.nbytes`. Raises `ValueError` where it is smaller."""
        if memory.numel() < layout.nbytes:
            raise ValueError(f"This picture takes {layout.nbytes} bytes of memory; these are {memory.numel()}.")
        self._layout, self._memory = layout, memory
        region = Region(memory, aligned(layout.maps_bytes))
        taken = [region.take(shape, dtype) for shape, dtype in layout.buffers]
        self._bordered, self._moments, self._terms = taken[:3]
        self._rows, self.own = taken[3:5], taken[5:]

    def matrices(self) -> list[Tensor]:
        """Attention's four matrices, each `[h w, C]`."""
        layout, region = self._layout, Region(self._memory, self._layout.attention)
        shape = (layout.height * layout.width, layout.spec.channels[-1])
        return [region.take(shape, layout.dtype) for _ in range(4)]

    def bordered(self, channels: int, height: int, width: int) -> Tensor:
        """A strip of that size with a border, `[1, C, h + 2, w + 2]`, uninitialized."""
        return channels_last(self._bordered, channels, height + 2, width + 2)

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
                last = channels_last(self._rows[i % 2], strip.shape[1], 1, strip.shape[3]).copy_(last)
            yield Window(above, strip, below)
            above = last

    def at(self, span: Span, channels: int, height: int, width: int) -> Tensor:
        """A map or a strip `[1, C, h, w]` in these bytes of the memory."""
        return channels_last(self._memory[span[0] : span[1]].view(self._layout.dtype), channels, height, width)


def channels_last(flat: Tensor, channels: int, height: int, width: int) -> Tensor:
    """`[1, C, h, w]` at the start of `flat`."""
    return flat[: channels * height * width].view(1, height, width, channels).permute(0, 3, 1, 2)
