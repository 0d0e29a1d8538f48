"""Inputs of one step of the miniature, and memory for it."""

from __future__ import annotations

import torch
from engine_parts import painter_of
from torch import Tensor

from vortex_core import Engine
from vortex_core.flux1 import sampling
from vortex_core.memory.arena import Region
from vortex_core.runtime.graphs import step_bytes

CPU = torch.device("cpu")


def rope(engine: Engine, height: int, width: int) -> tuple[Tensor, Tensor]:
    return sampling.rope(sampling.positions(height, width, 256), painter_of(engine).model.flux, CPU)


def size_of(height: int, width: int, batch: int) -> tuple[int, int, int]:
    return batch, 256, height // 16 * width // 16


def request(
    engine: Engine, height: int, width: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(height + width)
    img = torch.randn(batch, height // 16 * width // 16, 64, generator=draw)
    txt = torch.randn(batch, 256, painter_of(engine).model.flux.hidden, generator=draw)
    modulation = (
        torch.randn(painter_of(engine).model.flux.modulation_rows, painter_of(engine).model.flux.hidden, generator=draw)
        / 4
    )
    return img, txt, modulation, rope(engine, height, width)


def region(engine: Engine, size: tuple[int, int, int]) -> Region:
    return Region(torch.empty(step_bytes(painter_of(engine).model.flux, size, torch.float32), dtype=torch.uint8))
