"""Static plans: the step of one size, captured once as a CUDA graph and replayed.

At 512 x 512 Python and its launches take longer than the GPU's work. A replay is one launch. A graph holds one
step, not four: pictures can be cancelled and previewed between steps, and any number of steps works. Sizes share
their memory: inputs and buffers of each are laid out in the same one, and only one size draws at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import Any

import torch
from torch import Tensor

from .residency import ALIGN
from .spec import FluxSpec
from .step import Rope, buffers
from .transformer import Transformer

KEPT = 8  # graphs; a megabyte or so each
Size = tuple[int, int, int]  # pictures, text tokens, image tokens


class Plan:
    """The step of one size, laid out in `buffer`. On CUDA the first call captures it, and the others replay it.

    Between calls the buffer may serve others: every call brings all inputs.
    """

    def __init__(self, transformer: Transformer, size: Size, buffer: Tensor, pool: Any = None) -> None:
        spec, dtype = transformer.spec, transformer.img_in.weight.dtype
        used = 0

        def take(name: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            nonlocal used
            start, used = used, used + aligned(prod(shape) * kind.itemsize)
            return buffer[start : start + prod(shape) * kind.itemsize].view(kind).view(shape)

        self.transformer, self.pool = transformer, pool
        self.inputs = [take(name, shape, kind) for name, (shape, kind) in inputs(spec, size, dtype).items()]
        self.step = transformer.step(size, take)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, img: Tensor, txt: Tensor, modulation: Tensor, pe: Rope) -> Tensor:
        """As `Transformer`: the velocity `[B, S, 64]`, valid until the next call of any plan."""
        for kept, given in zip(self.inputs, (img, txt, modulation, *pe), strict=True):
            kept.copy_(given)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()  # also what compiles the kernels and picks the library's, before they are captured
            if self.inputs[0].device.type == "cuda":
                self.graph = self._capture()
        return self.step.velocity

    def _run(self) -> None:
        img, txt, modulation, cos, sin = self.inputs
        self.transformer(img, txt, modulation, (cos, sin), self.step)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads of the process do with CUDA must not break the capture
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self._run()
        return graph


class Plans:
    """The plans of the sizes drawn last, over one buffer that grows to the largest."""

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer
        self.buffer: Tensor | None = None
        self._plans: OrderedDict[Size, Plan] = OrderedDict()

    def reserve(self, size: Size) -> Tensor:
        """The buffer, with room for `size`; growing it forgets every plan."""
        weight = self.transformer.img_in.weight
        needed = plan_bytes(self.transformer.spec, size, weight.dtype, fast=self.transformer.fast)
        if self.buffer is None or self.buffer.numel() < needed:
            self.clear()
            self.buffer = torch.empty(needed, dtype=torch.uint8, device=weight.device)
            self._pool = torch.cuda.graph_pool_handle() if weight.device.type == "cuda" else None
        return self.buffer

    def plan(self, size: Size) -> Plan:
        """The plan of `size`."""
        buffer = self.reserve(size)
        if size not in self._plans:
            self._plans[size] = Plan(self.transformer, size, buffer, self._pool)
            if len(self._plans) > KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(size)
        return self._plans[size]

    def clear(self) -> None:
        """Forget every plan and give the buffer back. To be called when weights or workspaces move."""
        self._plans.clear()
        self.buffer = None


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
    """Bytes of buffer that a plan of `size` takes, exactly. Attention's output is the library's, and comes on top."""
    given = sum(aligned(prod(shape) * kind.itemsize) for shape, kind in inputs(spec, size, dtype).values())
    return given + sum(aligned(n * kind.itemsize) for n, kind in buffers(spec, size, dtype, fast=fast).values())


def aligned(nbytes: int) -> int:
    """Rounded up to where a tensor may start."""
    return -(-nbytes // ALIGN) * ALIGN
