"""Static plans: the step of one size between fixed buffers, captured once as a CUDA graph and replayed.

At 512 x 512 Python and its launches take longer than the GPU's work. A replay is one launch. A graph holds one
step, not four: pictures can be cancelled and previewed between steps, and any number of steps works. Where blocks
stream, a step is cut around each of them, and the host fetches their weights between graphs.

The buffers lie at the start of the memory that calls work in (workspace.py), after those that blocks stream through, so
that every size has them at the same address and they take no memory between calls. A graph stays valid as long as
these, the weights and the decode workspace stay where they are. What the library's attention allocates is a graph's
own, in one pool for all.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from .allocator import reserved
from .residency import Act, Stager, aligned
from .spec import FluxSpec
from .step import Rope, Step, buffers
from .transformer import Transformer
from .workspace import Workspace

log = logging.getLogger(__name__)

KEPT = 8  # recordings; a megabyte or so each, more where they are cut
Size = tuple[int, int, int]  # pictures, text tokens, image tokens
Velocity = Callable[[Tensor, Tensor, Tensor, Rope], Tensor]  # as `Transformer`


class Plan:
    """The step of one size, laid out in `buffer`."""

    def __init__(self, transformer: Transformer, size: Size, buffer: Tensor) -> None:
        spec, dtype = transformer.spec, transformer.img_in.weight.dtype
        used = 0

        def take(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            nonlocal used
            start, used = used, used + aligned(prod(shape) * kind.itemsize)
            return buffer[start : start + prod(shape) * kind.itemsize].view(kind).view(shape)

        self._transformer, self._size = transformer, size
        self._inputs = [take(shape, kind) for shape, kind in inputs(spec, size, dtype).values()]
        lengths = buffers(spec, size, dtype, fast=transformer.fast)
        self._buffers = {name: take((length,), kind) for name, (length, kind) in lengths.items()}
        self._velocity = self._buffers["velocity"].view(self._inputs[0].shape)

    def __call__(
        self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope, graph: Recording | None = None
    ) -> Tensor:
        """As `Transformer`: the velocity `[B, S, 64]`, valid until the next call. Replays `graph` if there is one."""
        for kept, given in zip(self._inputs, (img, txt, modulation, *pe), strict=True):
            kept.copy_(given)
        if graph is None:
            self.run()
        else:
            graph.replay()
        return self._velocity

    @cached_property
    def _step(self) -> Step:  # only where it is launched: a replay needs none of its many views
        return self._transformer.step(self._size, lambda name, shape, kind: self._buffers[name])

    def run(self) -> None:
        """From the inputs to the velocity, launch by launch."""
        img, txt, modulation, cos, sin = self._inputs
        self._transformer(img, txt, modulation, (cos, sin), self._step)


class Recording:
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
        """Launch it all on the current stream."""
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


class Plans:
    """The graphs of the sizes drawn last. `nbytes` is what they keep on the device besides the workspace.

    They are captured on `stream`, for which cuBLAS should have its memory before, so that no graph's pool holds it.
    """

    def __init__(self, transformer: Transformer, workspace: Workspace, *, allocates: bool = False) -> None:
        """`allocates`: weights are decoded into fresh memory, which is not to become a graph's own."""
        self.nbytes = 0
        self._transformer, self._workspace, self._allocates = transformer, workspace, allocates
        self._graphs: OrderedDict[Size, Recording] = OrderedDict()
        self._place: tuple[int, ...] | None = None
        self._pool: Any = None
        self.stream = torch.cuda.Stream(workspace.device) if workspace.device.type == "cuda" else None

    @contextmanager
    def open(self, size: Size, stager: Stager) -> Iterator[Velocity]:
        """The velocity for pictures of `size` and for fewer at once.

        To be opened just after `stager`, which brings the blocks that stream, and before anything else is allocated in
        the workspace. On CUDA the first call of a size is captured, and the others replay it, where fused kernels run.
        """
        transformer = self._transformer
        weight = transformer.img_in.weight
        needed = plan_bytes(transformer.spec, size, weight.dtype, fast=transformer.fast)
        buffer = torch.empty(needed, dtype=torch.uint8, device=weight.device)
        place = (self._workspace.epoch, buffer.data_ptr(), *stager.place)
        if place != self._place:
            self.clear()
            self._place = place
        captures = transformer.fused and not self._allocates and self._workspace.nbytes > 0
        plans: dict[Size, Plan] = {}
        held = [buffer]
        del buffer

        def velocity(img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope) -> Tensor:
            size = (img.shape[0], txt.shape[1], img.shape[1])
            if size not in plans:
                plans[size] = Plan(transformer, size, held[0])
            graph = self._graphs.get(size)
            if graph is not None:
                self._graphs.move_to_end(size)
            found = plans[size](img, txt, modulation, pe, graph)
            if captures and graph is None:  # that call also compiled the kernels and picked the library's
                self._capture(size, plans[size], stager)
            return found

        try:
            yield velocity
        finally:
            plans.clear()  # nothing may stay alive in the workspace
            held.clear()

    def _capture(self, size: Size, plan: Plan, stager: Stager) -> None:
        transformer = self._transformer
        needed = graph_bytes(
            transformer.spec, size, transformer.img_in.weight.dtype, fp8_attention=transformer.fp8_attention
        )
        with self._workspace.outside():
            if needed > self.nbytes:  # all in a pool as large as the largest needs
                self._drop()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            recording = Recording(self._pool)
            torch.cuda.synchronize(self._workspace.device)
            with torch.cuda.stream(self.stream), stager.handed(recording.between), recording.capture():
                plan.run()
        self.nbytes = max(self.nbytes, needed)
        self._graphs[size] = recording
        if len(self._graphs) > KEPT:
            self._graphs.popitem(last=False)
        log.info("Captured the step of %d x (%d + %d) tokens", *size)

    def clear(self) -> None:
        """Forget every graph, and give back what they kept. To be called before weights or workspaces move."""
        self._drop()
        self._place = None

    def _drop(self) -> None:
        if self._graphs:
            self._graphs.clear()
            self._pool = None
            torch.cuda.empty_cache()
        self.nbytes = 0


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


def plan_bytes(spec: FluxSpec, size: Size, dtype: torch.dtype, *, fast: bool) -> int:
    """Bytes of buffer that a plan of `size` takes, exactly. What the library's attention returns comes on top."""
    given = sum(aligned(prod(shape) * kind.itemsize) for shape, kind in inputs(spec, size, dtype).values())
    return given + sum(aligned(n * kind.itemsize) for n, kind in buffers(spec, size, dtype, fast=fast).values())


def graph_bytes(spec: FluxSpec, size: Size, dtype: torch.dtype, *, fp8_attention: bool) -> int:
    """Bytes that a graph of `size` keeps: what the library's attention returns, and its statistics in fp32."""
    if fp8_attention:  # which writes into the step's buffers
        return 0
    batch, txt_tokens, img_tokens = size
    tokens = batch * (txt_tokens + img_tokens)
    return reserved((tokens * spec.hidden * dtype.itemsize, tokens * spec.heads * 4))
