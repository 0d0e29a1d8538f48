"""The step of one size between fixed buffers, captured once as a CUDA graph and replayed.

At 512 x 512 Python and its launches take longer than the GPU's work. A replay is one launch. A graph holds one
step, not four: pictures can be cancelled and previewed between steps, and any number of steps works. Where blocks
stream, a step is cut around each of them, and the host fetches their weights between graphs.

A graph is valid as long as every address in it is: of the arena, where buffers, staging and decoded weights lie, of the
weights, of cuBLAS' workspaces. They are its key, asked anew at each step, so that one that is not valid any more is
never found. What the library's attention allocates is the graph's own, in one pool for all.
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
from ..flux1.spec import FluxSpec
from ..flux1.step_buffers import Rope, StepBuffers, buffers
from ..flux1.transformer import Transformer
from ..memory.arena import MIB, Region, aligned, laid_out, round_up
from ..memory.offload import Act, Prefetcher

log = logging.getLogger(__name__)

KEPT = 8  # graphs; a megabyte or so each, more where they are cut
POOL = 32 * MIB  # what cudaMallocAsync takes at once for graphs; torch's own allocator takes less
Size = tuple[int, int, int]  # pictures, text tokens, image tokens
Address = tuple[int, ...]
Lend = Callable[[], AbstractContextManager[None]]
Velocity = Callable[[Tensor, Tensor, Tensor, Rope], Tensor]  # as `BoundStep`


class BoundStep:
    """The step of one size, with its buffers at the start of `region`."""

    def __init__(self, transformer: Transformer, size: Size, region: Region) -> None:
        spec, dtype = transformer.spec, transformer.img_in.weight.dtype
        self._transformer, self._size = transformer, size
        self._inputs = [region.take(shape, kind) for shape, kind in inputs(spec, size, dtype).values()]
        lengths = buffers(spec, size, dtype, fast=transformer.fast)
        self._buffers = {name: region.take((length,), kind) for name, (length, kind) in lengths.items()}
        self._velocity = region.take(self._inputs[0].shape, torch.float32)

    def __call__(
        self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, graph: PiecewiseGraph | None = None
    ) -> Tensor:
        """The velocity, fp32 `[B, S, 64]`, valid until the next call; see `Transformer`. Replays `graph` if given."""
        for kept, given in zip(self._inputs, (img, txt, modulation, *pe), strict=True):
            kept.copy_(given)
        if graph is None:
            self.run()
        else:
            graph.replay()
        return self._velocity.copy_(self._buffers["velocity"].view(self._velocity.shape))

    @cached_property
    def _step(self) -> StepBuffers:  # only where it is launched: a replay needs none of its many views
        return self._transformer.step(self._size, lambda name, shape, kind: self._buffers[name])

    def run(self) -> None:
        """From the inputs to the velocity, launch by launch."""
        img, txt, modulation, cos, sin = self._inputs
        self._transformer(img, txt, modulation, (cos, sin), self._step)


class PiecewiseGraph:
    """A captured step: CUDA graphs in one pool, and what the host does between them."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._parts: list[Act] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Capture what the current stream is given inside."""
        self._begin()
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # what went wrong is told, not that the capture did with it
                self._graph.capture_end()
            raise
        self._end()

    def between(self, act: Act) -> None:
        """While it captures: `act` is to be done here in each replay."""
        self._end()
        self._parts.append(act)
        self._begin()

    def replay(self) -> None:
        """Launch it all on the current stream. The driver may find only here that it has no memory for a graph."""
        for part in self._parts:
            part()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads of the process do with CUDA must not break the capture
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # two streamed blocks follow each other
            self._graph.capture_end()
        self._parts.append(self._graph.replay)


class GraphCache:
    """The graphs of the sizes drawn last. `reserved` is what torch has reserved for them besides the arena."""

    def __init__(self, transformer: Transformer, device: torch.device) -> None:
        self.reserved = 0
        self._transformer, self._device = transformer, device
        self._graphs: OrderedDict[tuple[Size, Address], PiecewiseGraph] = OrderedDict()
        self._pool: Any = None
        self._largest = 0  # bytes that a graph in the pool was planned to keep

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes that are captured: pictures, text tokens, image tokens."""
        return tuple(size for size, _ in tuple(self._graphs))

    @property
    def nbytes(self) -> int:
        """What they keep: torch has reserved it, or the driver has it, who does not tell whose it is."""
        return self.reserved + min(graph_memory(self._device), self._largest)

    def open(
        self,
        size: Size,
        region: Region,
        prefetcher: Prefetcher,
        address: Callable[[], Address] = tuple,
        lend: Lend = nullcontext,
    ) -> Velocity:
        """The velocity for pictures of `size` and for fewer at once, with buffers from `region`.

        `prefetcher` brings the blocks that stream. `address`: where weights and workspaces lie now. On CUDA the first
        call of a size is captured, and the others replay it, where fused kernels run; others run inside `lend`.
        """
        transformer, start = self._transformer, region.used
        weight = transformer.img_in.weight
        region.take((step_bytes(transformer.spec, size, weight.dtype, fast=transformer.fast),), torch.uint8)
        steps: dict[Size, BoundStep] = {}

        def velocity(img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope) -> Tensor:
            size = (img.shape[0], txt.shape[1], img.shape[1])
            if size not in steps:
                steps[size] = BoundStep(transformer, size, region.again(start))
            place = (region.memory.data_ptr(), start, *address())
            graph = self._graphs.get((size, place))
            if graph is not None:
                self._graphs.move_to_end((size, place))
                return steps[size](img, txt, modulation, pe, graph)
            with lend():
                found = steps[size](img, txt, modulation, pe)  # compiles the kernels and picks the library's, too
            if transformer.fused:
                self._capture(size, place, steps[size], prefetcher)
            return found

        return velocity

    def _capture(self, size: Size, place: Address, step: BoundStep, prefetcher: Prefetcher) -> None:
        transformer = self._transformer
        needed = round_up(attention_bytes(transformer.spec, size, transformer.img_in.weight.dtype), POOL)
        needed = 0 if transformer.fp8_attention else needed  # which writes into the step's buffers
        if needed > self._largest or any(other != place for _, other in self._graphs):
            self.clear()  # all in a pool as large as the largest needs; and what is not valid any more goes
            hand_back(self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        before = counters(self._device).reserved
        try:
            self._graphs[size, place] = self._record(step, prefetcher)
        except BaseException:
            self.clear()  # the pool with them, which may be none any more
            raise
        self.reserved += max(0, counters(self._device).reserved - before)
        self._largest = max(self._largest, needed)
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        log.info("Captured the step of %d x (%d + %d) tokens", *size)

    def _record(self, step: BoundStep, prefetcher: Prefetcher) -> PiecewiseGraph:
        streams, graph = streams_of(self._device), PiecewiseGraph(self._pool)
        assert streams is not None
        gc.collect()  # or what is collected meanwhile might do what a capture forbids
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(streams.capture), prefetcher.deferred(graph.between), graph.capture():
            step.run()
        return graph

    def clear(self) -> None:
        """Forget every graph; what they kept is torch's to hand back."""
        self._graphs.clear()
        self._pool, self.reserved, self._largest = None, 0, 0


def inputs(spec: FluxSpec, size: Size, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of a step's inputs."""
    batch, txt_tokens, img_tokens = size
    rope = ((txt_tokens + img_tokens, spec.head_dim // 2), torch.float32)
    return {
        "img": ((batch, img_tokens, spec.in_channels), dtype),
        "txt": ((batch, txt_tokens, spec.hidden), dtype),
        "modulation": ((spec.modulation_rows, spec.hidden), dtype),
        "cos": rope,
        "sin": rope,
    }


def step_bytes(spec: FluxSpec, size: Size, dtype: torch.dtype, *, fast: bool) -> int:
    """Bytes that a step of `size` lays out, exactly. What the library's attention returns comes on top."""
    given = inputs(spec, size, dtype)
    lengths = [((length,), kind) for length, kind in buffers(spec, size, dtype, fast=fast).values()]
    return laid_out([*given.values(), (given["img"][0], torch.float32), *lengths])


def attention_bytes(spec: FluxSpec, size: Size, dtype: torch.dtype) -> int:
    """Bytes that the library's attention allocates in a step: what it returns, and its statistics in fp32."""
    tokens = size[0] * (size[1] + size[2])
    return aligned(tokens * spec.hidden * dtype.itemsize) + aligned(tokens * spec.heads * 4)
