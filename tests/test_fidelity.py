"""The fidelity gate: how far one transformer call may be from the reference, and that it notices what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from engine_parts import painter_of
from torch import Tensor

from vortex_core import Engine
from vortex_core.flux1 import sampling
from vortex_core.flux1.spec import FluxSpec

GATE = 1.5e-2  # relative error of one call in bf16, against the same NF4 weights


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error of `a`."""
    return float((a - b).norm() / b.norm())


def blocks(spec: FluxSpec) -> Iterator[tuple[str, slice, list[int]]]:
    """Each block's name, its rows in the modulation table, and which of those are gates."""
    for i in range(spec.double_blocks):
        yield f"double {i}", slice(12 * i, 12 * i + 12), [2, 5, 8, 11]
    for i in range(spec.single_blocks):
        start = 12 * spec.double_blocks + 3 * i
        yield f"single {i}", slice(start, start + 3), [2]


@torch.inference_mode()
def test_the_gate_has_teeth(engine: Engine) -> None:
    """A block left out, or two blocks' modulation in each other's place, is farther off than the gate allows."""
    draw = torch.Generator().manual_seed(0)
    img = torch.randn(1, 64, 64, generator=draw)
    conditioning = engine.encode("a small green star above a large yellow ring")
    pe = sampling.rope(sampling.positions(128, 128, 256), painter_of(engine).model.flux, torch.device("cpu"))
    txt = painter_of(engine).model.transformer.txt_in(conditioning.txt)
    for table in conditioning.modulation:
        right = painter_of(engine).model.transformer(img, txt, table, pe)
        rows = list(blocks(painter_of(engine).model.flux))
        for name, place, gates in rows:
            wrong = table.clone()
            wrong[place][gates] = 0  # what a block adds is multiplied by its gates
            assert distance(painter_of(engine).model.transformer(img, txt, wrong, pe), right) > GATE, f"without {name}"
        for (name, one, _), (other_name, two, _) in pairwise(rows):
            if table[one].shape == table[two].shape:
                wrong = table.clone()
                wrong[one], wrong[two] = table[two], table[one]
                off = distance(painter_of(engine).model.transformer(img, txt, wrong, pe), right)
                assert off > GATE, f"{name} and {other_name} exchanged"
