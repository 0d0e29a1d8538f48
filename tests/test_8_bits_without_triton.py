"""8 bits on cards without Triton, simulated: engines load, plan, capture and draw; the code of other cards is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_parts import painter_of
from kernel_parts import DEVICE, draw
from torch import Tensor

from vortex_core import kernels, load_flux_schnell, nf4
from vortex_core.device.vram import graph_memory
from vortex_core.kernels import ScaledTensor, compiled, nvrtc, reference
from vortex_core.memory.planner import smallest_budget
from vortex_core.quant.precision import Fp8, Int8
from vortex_core.runtime import modes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("seeded")]
JOBS: list[dict[str, Any]] = [{"seed": seed, "height": side, "width": 128} for seed, side in enumerate((128, 64, 256))]


@pytest.fixture(params=[(8, 6), (8, 9), (9, 0)], ids=["RTX 30", "RTX 40", "Hopper"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What `fast` gets on such a card without Triton."""
    if request.param > torch.cuda.get_device_capability():
        pytest.skip("NOT RUN, fp8: this card has none")
    for module in (kernels, modes):
        monkeypatch.setattr(module, "fused_declined", lambda device: "as on Windows")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: request.param)
    return "fp8" if request.param == (9, 0) else "int8"


def test_fast_is_captured_repeats_and_is_near_exact(precision: str) -> None:
    with load_flux_schnell("tiny", device="cuda", backend="nvrtc", mode="exact") as engine:
        exact = [engine.generate("a blue square", **job).clone() for job in JOBS]
    runs: list[list[Tensor]] = []
    for _ in range(2):
        with load_flux_schnell("tiny", device="cuda", backend="nvrtc", mode="fast") as engine:
            assert painter_of(engine).model.precision in (Int8(compiled), Fp8())
            assert engine.precision == precision
            engine.generate("a ring", seed=0, height=256, width=128)  # so that the block stays
            for _ in range(2):
                runs.append([engine.generate("a blue square", **job).clone() for job in JOBS])
            assert len(engine.captured) == len(JOBS)
    assert all(all(map(torch.equal, run, runs[0])) for run in runs[1:])
    off = [float((a - b).abs().mean() * 255) for a, b in zip(runs[0], exact, strict=True)]
    print(f"\n{precision}: mean {off} of 255", end="")
    assert max(off) < 6
    assert not torch.equal(runs[0][0], exact[0])


def test_blocks_stream_and_the_peak_is_planned(precision: str) -> None:
    with load_flux_schnell("tiny", device="cuda", backend="nvrtc", mode=precision) as engine:
        before = torch.cuda.memory_reserved() + graph_memory(engine.device)
        memory, model = painter_of(engine).memory, painter_of(engine).model
        held = sum(memory.components.values())
        torch.cuda.reset_peak_memory_stats()
        expected = [engine.generate("a blue square", **job).clone() for job in JOBS]
        peak = torch.cuda.max_memory_reserved() + graph_memory(engine.device)
        assert peak - max(0, before - held) <= engine.plan.peak
        memory.budget = smallest_budget(model.sizes, model.requirements(128, 128, 1, blas=memory.blas))
        for _ in range(2):
            assert torch.equal(engine.generate("a blue square", **JOBS[0]), expected[0])
        assert len(memory.placement.steps.groups) > 1


@pytest.fixture(params=["compute_80", "compute_86", "compute_89"])
def other_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are compiled for another card, and its PTX for this one by the driver."""
    real = nvrtc.compiled
    monkeypatch.setattr(nvrtc, "compiled", lambda text, arch: real(text, request.param))
    nvrtc._functions.cache_clear()
    yield
    nvrtc._functions.cache_clear()


@pytest.mark.usefixtures("other_card")
@pytest.mark.parametrize("m", [37, 1280])
def test_the_code_of_another_card_is_right_here(m: int) -> None:
    weight, x = nf4.quantize_reference(draw(1152, 3072)), draw(1, m, 3072, dtype=torch.bfloat16)
    found = []
    for functions in (compiled, reference):
        scale, decoded = torch.empty(1152, device=DEVICE), torch.empty(1152, 3072, dtype=torch.int8, device=DEVICE)
        functions.row_scales(weight.packed, weight.absmax, scale, torch.int8)
        functions.dequantize(weight.packed, weight.absmax, decoded, scale)
        operand = ScaledTensor(torch.empty_like(x, dtype=torch.int8), torch.empty(1, m, device=DEVICE))
        functions.modulate(x, x[0, 0], x[0, 1], operand)
        assert operand.scale is not None
        out = torch.full((m, 1152), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        functions.multiply_int8(operand.values[0], operand.scale[0], decoded, scale, None, out)
        found.append((scale, decoded, out.float()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-3, atol=0)
    assert int((found[0][1].int() - found[1][1].int()).abs().max()) <= 1
    assert (found[0][2] - found[1][2]).norm() < 0.008 * found[1][2].norm()
