"""Engines on a card without Triton: captured steps and decodes, equal bits, peaks within the plan."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from engine_parts import painter_of
from torch import Tensor

from vortex_core import Engine, kernels, load_flux_schnell
from vortex_core.device.vram import graph_memory
from vortex_core.kernels import compiled, library
from vortex_core.memory.planner import smallest_budget
from vortex_core.runtime import decoder_graphs
from vortex_core.runtime.decoder_graphs import DecoderGraphs

CPU = torch.device("cpu")


class Decodes(DecoderGraphs):
    """A card that captures: a replay does what ran."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.told: list[str] = []

    def _record(self, run: object) -> SimpleNamespace:
        self.told.append("captured")
        return SimpleNamespace(replay=lambda: self.told.append("replayed"))


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Decodes:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Decodes()


def test_a_decode_runs_is_captured_and_then_replayed(decodes: Decodes) -> None:
    run = lambda: decodes.told.append("ran")  # noqa: E731
    for _ in range(3):
        decodes.launch((64, 64, None, 7, 8), run, 2**20)
    assert decodes.told == ["ran", "captured", "replayed", "replayed"]
    decodes.told.clear()
    decodes.launch((64, 48, None, 7, 8), run, 2**20)  # another size
    decodes.launch((64, 64, None, 7, 8), run, 2**20)
    assert decodes.told == ["ran", "captured", "replayed"]
    decodes.told.clear()
    decodes.launch((64, 64, None, 7, 9), run, 2**20)  # weights moved: no graph of before is found again
    decodes.launch((64, 48, None, 7, 9), run, 2**20)
    assert decodes.told == ["ran", "captured"] * 2
    assert len(decodes._graphs) == 2


def test_a_larger_decode_gets_a_pool_of_its_own_size(decodes: Decodes) -> None:
    decodes.launch((64, 64, None, 7), decodes.told.clear, 2**20)
    assert decodes.planned == decoder_graphs.POOL
    decodes.launch((128, 128, 64, 7), decodes.told.clear, 40 * 2**20)
    assert decodes.planned == 2 * decoder_graphs.POOL
    assert list(decodes._graphs) == [(128, 128, 64, 7)]
    decodes.launch((64, 64, None, 7), decodes.told.clear, 2**20)
    assert decodes.planned == 2 * decoder_graphs.POOL
    for rows in range(decoder_graphs.KEPT):
        decodes.launch((64, 64, rows, 7), decodes.told.clear, 2**20)
    assert len(decodes._graphs) == decoder_graphs.KEPT
    decodes.clear()
    assert (decodes.planned, decodes.reserved, len(decodes._graphs)) == (0, 0, 0)


def test_a_capture_that_fails_leaves_nothing(decodes: Decodes, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes.launch((64, 64, None, 7), decodes.told.clear, 2**20)

    def fails(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decodes, "_record", fails)
    with pytest.raises(KeyboardInterrupt):
        decodes.launch((64, 48, None, 7), decodes.told.clear, 2**20)
    assert not decodes._graphs
    assert decodes._pool is None


def test_nothing_is_captured_on_the_cpu(engine: Engine) -> None:
    painter = painter_of(engine)
    engine.generate("a blue square", seed=1, height=64, width=64)
    assert not painter.model.captures_decodes
    assert not painter.memory.decodes._graphs
    assert painter.memory.plan.step.graph == 0


# On a card.

WAYS = [("nvrtc", compiled), ("bitsandbytes", compiled), ("bitsandbytes", library), ("reference", library)]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1].__name__.rpartition('.')[2]}")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend, and how Triton is missing: alone, or with NVRTC."""
    backend, functions = request.param
    if backend == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="NOT RUN, bitsandbytes' decode in a graph: it is not installed here")
    monkeypatch.setattr(kernels, "fused_declined", lambda device: "as on Windows")
    if functions is library:
        monkeypatch.setattr(kernels, "compiled_declined", lambda device: "as if NVRTC were missing")
    return backend


@pytest.mark.gpu
def test_pictures_without_triton_are_captured_and_repeat_bit_for_bit(way: str) -> None:
    jobs = [{"seed": seed, "height": side, "width": 128} for seed, side in enumerate((128, 64, 256, 128))]
    with load_flux_schnell("tiny", device="cuda", backend=way) as engine:
        memory = painter_of(engine).memory

        def drawn() -> list[Tensor]:
            return [engine.generate("a blue square", **job).clone() for job in jobs]

        engine.generate("a ring", seed=0, height=256, width=128)  # so that the block stays
        launched = drawn()
        assert len(engine.captured) == 3
        assert len(memory.decodes._graphs) == 3
        kept = dict(memory.graphs._graphs), dict(memory.decodes._graphs)
        assert all(map(torch.equal, drawn(), launched))
        assert (dict(memory.graphs._graphs), dict(memory.decodes._graphs)) == kept  # nothing was captured again
        torch._C._cuda_clearCublasWorkspaces()
        assert all(map(torch.equal, drawn(), launched))
        engine.offload()
        assert not memory.decodes._graphs
        assert all(map(torch.equal, drawn(), launched))
    with load_flux_schnell("tiny", device="cuda", backend=way) as engine:  # another run
        assert all(map(torch.equal, drawn(), launched))


@pytest.mark.gpu
def test_blocks_that_stream_are_captured_without_triton(way: str) -> None:
    with load_flux_schnell("tiny", device="cuda", backend=way) as engine:
        memory, model = painter_of(engine).memory, painter_of(engine).model
        expected = engine.generate("a blue square", seed=1, height=128, width=128).clone()
        asked = model.requirements(128, 128, 1, blas=memory.blas)
        memory.budget = smallest_budget(model.sizes, asked)
        for _ in range(2):
            assert torch.equal(engine.generate("a blue square", seed=1, height=128, width=128), expected)
        assert len(memory.placement.steps.groups) > 1
        assert len(memory.graphs._graphs) == 1


@pytest.mark.gpu
def test_the_peak_without_triton_is_within_the_plan(way: str) -> None:
    with load_flux_schnell("tiny", device="cuda", backend=way) as engine:
        before = torch.cuda.memory_reserved() + graph_memory(engine.device)
        held = sum(painter_of(engine).memory.components.values())
        for side in (128, 256):
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                engine.generate("a blue square", seed=1, height=side, width=side)
            peak = torch.cuda.max_memory_reserved() + graph_memory(engine.device)
            print(f"\n{way} {side}: {peak / 1e6:.0f} of {engine.plan.peak / 1e6:.0f} MB", end="")
            assert peak - max(0, before - held) <= engine.plan.peak


@pytest.mark.gpu
def test_cuda_c_draws_what_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused_declined", lambda device: "as on Windows")
    pictures = []
    for reason in (None, "as if NVRTC were missing"):
        monkeypatch.setattr(kernels, "compiled_declined", lambda device, reason=reason: reason)
        with load_flux_schnell("tiny", device="cuda", backend="reference") as engine:
            pictures.append(engine.generate("a blue square", seed=1).clone())
    off = (pictures[0] - pictures[1]).abs() * 255
    print(f"\nmean {off.mean():.3f}, max {off.max():.1f} of 255", end="")
    assert off.mean() < 1.5
