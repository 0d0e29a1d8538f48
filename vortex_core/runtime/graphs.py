"""The step of one size between fixed buffers, captured once as a CUDA graph and replayed.

At 512 x 512 launching kernels from Python takes longer than the GPU's work; a replay is one launch. A graph holds one
step, not four: pictures can be cancelled and previewed between steps, and any number of steps works. Where blocks
stream, a step is cut around each of them, and the host fetches their weights between the parts.

A graph is valid while its addresses are: those of the arena (step buffers, staging buffers, dequantized weights), of
the weights and of cuBLAS' workspaces. They are part of its key and are read again at each step, so that a graph that is
no longer valid is never found. What is allocated inside lies in one pool, which all graphs share: the library's
attention, and kernels that are the library's.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..device.streams import streams_of
from ..device.vram import counters, graph_memory, hand_back
from ..flux1.denoiser import Velocity
from ..flux1.spec import FluxSpec
from ..flux1.step_buffers import Rope, Size, StepBuffers, StepSize, buffers
from ..flux1.transformer import Transformer
from ..memory.arena import MIB, Region, Shape, aligned, laid_out, round_up
from ..memory.offload import Act, Prefetcher
from ..quant.precision import EXACT, Precision

log = logging.getLogger(__name__)

KEPT = 8  # graphs; about a megabyte each, more where they are cut
POOL = 32 * MIB  # what cudaMallocAsync takes at a time for graphs; torch's own allocator takes less
Address = tuple[int, ...]


class BoundStep:
    """The step of one size, with its buffers at the start of `region`."""

    def __init__(self, transformer: Transformer, size: Size, region: Region) -> None:
        spec, dtype = transformer.spec, transformer.img_in.weight.dtype
        self._transformer, self._size = transformer, size
        self._inputs = [region.take(shape, kind) for shape, kind in inputs(spec, size, dtype).values()]
        flat = buffers(spec, size, dtype, transformer.precision)
        self._buffers = {name: region.take(shape, kind) for name, (shape, kind) in flat.items()}
        self._velocity = region.take(self._inputs[0].shape, torch.float32)

    def __call__(
        self,
        img: Tensor,
        txt: Tensor,
        modulation: Tensor,
        pe: Rope,
        nag: Tensor | None = None,
        graph: PiecewiseGraph | None = None,
    ) -> Tensor:
        """The velocity, fp32 `[B, S, 64]`, valid until the next call; see `Transformer`. Replays `graph` if given."""
        terms = () if nag is None else (nag,)
        for kept, given in zip(self._inputs, (img, txt, modulation, *pe, *terms), strict=True):
            kept.copy_(given)
        if graph is None:
            self.run()
        else:
            graph.replay()
        return self._velocity.copy_(self._buffers["velocity"].view(self._velocity.shape))

    @cached_property
    def _step(self) -> StepBuffers:  # made only to launch a step: a replay needs none of its many views
        return self._transformer.step(self._size, lambda name, shape, kind: self._buffers[name])

    def run(self) -> None:
        """From the inputs to the velocity, kernel by kernel."""
        img, txt, modulation, cos, sin, *terms = self._inputs
        self._transformer(img, txt, modulation, (cos, sin), terms[0] if terms else None, self._step)


class PiecewiseGraph:
    """A captured step: CUDA graphs in one pool, and what the host does between them."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._parts: list[Act] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Inside, capture what is launched on the current stream."""
        self._begin()
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # the first error counts; the broken capture only follows from it
                self._graph.capture_end()
            raise
        self._end()

    def between(self, act: Act) -> None:
        """During a capture: have every replay call `act` at this place."""
        self._end()
        self._parts.append(act)
        self._begin()

    def replay(self) -> None:
        """Launch all parts on the current stream. Only here may the driver find that it has no memory for a graph."""
        for part in self._parts:
            part()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do with CUDA must not break the capture
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # between two streamed blocks in a row
            self._graph.capture_end()
        self._parts.append(self._graph.replay)


class GraphCache:
    """The graphs of the latest sizes.

    `reserved`: bytes that torch has reserved for them besides the arena; `planned`: those that a graph in the pool was
    planned to keep.
    """

    def __init__(self, transformer: Transformer, device: torch.device, allocates: int = 0) -> None:
        """`allocates`: bytes that a step takes besides its buffers and attention."""
        self.reserved = 0
        self._transformer, self._device, self._allocates = transformer, device, allocates
        self._graphs: OrderedDict[tuple[StepSize, Address], PiecewiseGraph] = OrderedDict()
        self._pool: Any = None
        self.planned = 0

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """The sizes that are captured: pictures, text tokens (with those to avoid), image tokens."""
        return tuple(size[:3] for size, _ in tuple(self._graphs))

    @property
    def nbytes(self) -> int:
        """Bytes that they keep: reserved by torch, or by the driver, which does not tell for whom."""
        return self.reserved + min(graph_memory(self._device), self.planned)

    def open(
        self,
        size: Size,
        region: Region,
        prefetcher: Prefetcher,
        address: Callable[[], Address] = tuple,
        lend: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Velocity:
        """The velocity function for pictures of `size`, and for fewer at a time, with buffers from `region`.

        `prefetcher` brings the blocks that stream. `address`: where weights and workspaces lie now. On a card the
        first call of a size is captured, and later ones replay it. What is not replayed runs inside `lend`.
        """
        transformer, start, away = self._transformer, region.used, StepSize(*size).away
        weight = transformer.img_in.weight
        region.take((step_bytes(transformer.spec, size, weight.dtype, transformer.precision),), torch.uint8)
        steps: dict[StepSize, BoundStep] = {}

        def velocity(img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, nag: Tensor | None = None) -> Tensor:
            size = StepSize(img.shape[0], txt.shape[1], img.shape[1], away)
            if size not in steps:
                steps[size] = BoundStep(transformer, size, region.again(start))
            place = (region.memory.data_ptr(), start, *address())
            graph = self._graphs.get((size, place))
            if graph is not None:
                self._graphs.move_to_end((size, place))
                return steps[size](img, txt, modulation, pe, nag, graph)
            with lend():
                found = steps[size](img, txt, modulation, pe, nag)  # compiles kernels, too
            if transformer.on_card:
                self._capture(size, place, steps[size], prefetcher)
            return found

        return velocity

    def _capture(self, size: StepSize, place: Address, step: BoundStep, prefetcher: Prefetcher) -> None:
        transformer = self._transformer
        dtype = transformer.img_in.weight.dtype
        attention = attention_bytes(transformer.spec, size, dtype, transformer.precision)
        needed = round_up(attention + self._allocates, POOL)
        if needed > self.planned or any(other != place for _, other in self._graphs):
            self.clear()  # the pool is made for the largest graph, and graphs of other places are not valid any more
            hand_back(self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        before = counters(self._device).reserved
        try:
            self._graphs[size, place] = self._record(step, prefetcher)
        except BaseException:
            self.clear()  # with the pool, which the failed capture may have broken
            raise
        self.reserved += max(0, counters(self._device).reserved - before)
        self.planned = max(self.planned, needed)
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        log.info("Captured the step of %d x (%d + %d) tokens%s", *size[:3], ", with NAG" if size.away else "")

    def _record(self, step: BoundStep, prefetcher: Prefetcher) -> PiecewiseGraph:
        streams, graph = streams_of(self._device), PiecewiseGraph(self._pool)
        assert streams is not None
        gc.collect()  # now, since a finalizer might do what a capture forbids
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(streams.capture), prefetcher.deferred(graph.between), graph.capture():
            step.run()
        return graph

    def clear(self) -> None:
        """Drop every graph; `hand_back` then frees what they kept."""
        self._graphs.clear()
        self._pool, self.reserved, self.planned = None, 0, 0


def inputs(spec: FluxSpec, size: Size, dtype: torch.dtype) -> dict[str, Shape]:
    """Shapes and types of a step's inputs."""
    batch, txt_tokens, img_tokens, away = StepSize(*size)
    rope = ((txt_tokens + img_tokens, spec.head_dim // 2), torch.float32)
    return {
        "img": ((batch, img_tokens, spec.in_channels), dtype),
        "txt": ((batch, txt_tokens, spec.hidden), dtype),
        "modulation": ((spec.modulation_rows, spec.hidden), dtype),
        "cos": rope,
        "sin": rope,
    } | ({"nag": ((3,), torch.float32)} if away else {})


def step_bytes(spec: FluxSpec, size: Size, dtype: torch.dtype, precision: Precision = EXACT) -> int:
    """Bytes that a step of `size` lays out, exactly; without what the library's attention allocates."""
    given, flat = inputs(spec, size, dtype), buffers(spec, size, dtype, precision)
    return laid_out([*given.values(), (given["img"][0], torch.float32), *flat.values()])


def attention_bytes(spec: FluxSpec, size: Size, dtype: torch.dtype, precision: Precision = EXACT) -> int:
    """Bytes that attention allocates in a step: the library's results and their statistics in fp32; none in fp8."""
    pictures, txt, img, away = StepSize(*size)
    lengths = (away + img, txt - away + img) if away else () if precision.fp8_attention else (txt + img,)
    values = (pictures * tokens for tokens in lengths)
    return sum(aligned(each * spec.hidden * dtype.itemsize) + aligned(each * spec.heads * 4) for each in values)


def activation_bytes(spec: FluxSpec, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a step takes at most which allocates as it goes, for this many tokens of text and image in all.

    The widest moment is inside a single block: its input and output, linear1's result (7 D), queries and keys before
    and after their norms and in fp32 while they turn, and what linear2 takes (5 D), twice.
    """
    wide = 3 * spec.hidden + spec.mlp
    return tokens * dtype.itemsize * (8 * spec.hidden + 3 * wide) + tokens * spec.hidden * 4 * 4
