"""An engine's plans, captures and ledger under either of torch's allocators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_parts import forget_prompts, painter_of
from memory_parts import AMPLE, CPU, CUDA, GB, asked, draw, narrow, nearly_full, streams
from torch import Tensor

from vortex_core import Engine, MemoryPressureWarning
from vortex_core.device import streams as streams_module
from vortex_core.device import vram
from vortex_core.device.vram import Counters, Ledger, Snapshot
from vortex_core.flux1.transformer import Transformer
from vortex_core.memory.planner import MemoryPlan
from vortex_core.runtime import graphs, memory_manager
from vortex_core.runtime.graphs import BoundStep, GraphCache


class Backend:
    """torch's counters under one of its allocators: what captured steps keep is in `reserved`, or the driver's.

    A captured step runs what it captured, and keeps what was planned for it; all share a pool.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, *, inside: bool) -> None:
        self.engine, self.inside, self.kept, self.total = engine, inside, 0, 8 * 10**9
        self.told: list[object] = []
        model = painter_of(engine).model
        monkeypatch.setattr(model, "captured", True)
        monkeypatch.setattr(model, "_known", {})
        monkeypatch.setattr(Transformer, "on_card", property(lambda transformer: True))
        monkeypatch.setattr(GraphCache, "_record", lambda cache, step, prefetcher: self.record(step))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        for module in (memory_manager, graphs):
            monkeypatch.setattr(module, "counters", lambda device: self.counters)
            monkeypatch.setattr(module, "hand_back", self.hand_back)
        for module in (memory_manager, graphs, vram):
            monkeypatch.setattr(module, "graph_memory", lambda device: self.outside)
        monkeypatch.setattr(vram, "snapshot", self.snapshot)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
        monkeypatch.setattr(memory_manager, "available", lambda device, own: vram.available(CUDA, own))

    @property
    def outside(self) -> int:
        return 0 if self.inside else self.kept

    @property
    def counters(self) -> Counters:
        allocated = sum(painter_of(self.engine).memory.components.values())
        return Counters(allocated, allocated + self.kept - self.outside)

    def snapshot(self, device: torch.device, *, process: bool = True) -> Snapshot:
        now = self.counters
        free = self.total - now.reserved - self.outside
        return Snapshot(now.allocated, now.reserved, process=None, free=free, total=self.total)

    def record(self, step: BoundStep) -> SimpleNamespace:
        size = tuple(step._size[:3])
        self.kept = max(self.kept, self.engine.plan.step.graph)
        self.told.append(("captured", size))

        def replay() -> None:
            self.told.append("replayed")
            step.run()

        return SimpleNamespace(replay=replay)

    def hand_back(self, device: torch.device) -> None:
        if not self.engine.captured:
            self.kept = 0

    @property
    def ledger(self) -> Ledger:
        """The engine's, as on a card."""
        held = painter_of(self.engine).memory
        held.device = CUDA
        try:
            return held.ledger
        finally:
            held.device = CPU


def story(monkeypatch: pytest.MonkeyPatch, engine: Engine, *, inside: bool, total: int) -> list[object]:
    """All that can be told of an engine through a few calls under one allocator."""
    painter_of(engine).memory.offload()
    forget_prompts(engine)
    painter_of(engine).memory.budget = AMPLE * GB
    with monkeypatch.context() as context:
        card = Backend(context, engine, inside=inside)
        card.total = total
        told = card.told

        def note(picture: Tensor | None = None) -> None:
            ledger, made = card.ledger, engine.plan
            assert ledger.outside == card.outside
            assert (
                ledger.graphs == card.kept == painter_of(engine).memory.graphs.nbytes <= made.step.graph
                or not engine.captured
            )
            assert ledger.held <= made.peak
            assert sum(ledger.rows.values()) == ledger.held
            told.extend([made, engine.captured, ledger.rows, ledger.held, painter_of(engine).memory.nbytes])
            if picture is not None:
                told.append(picture.sum().item())

        for size in ((64, 64), (128, 128), (64, 64), (64, 64)):
            note(draw(engine, height=size[0], width=size[1]))
        for batch in (3, 1):
            note(draw(engine, batch_size=batch))
        assert ("captured", (1, 256, 24)) in told
        assert "replayed" in told
        narrow(engine)  # weights move
        note(draw(engine))
        assert streams(engine)
        painter_of(engine).memory.offload()
        note()
        assert engine.captured == ()
        assert card.kept == 0
        note(draw(engine))
        painter_of(engine).memory.release()
        assert card.kept == 0
    return told


def test_plans_captures_and_ledger_are_those_of_any_allocator(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    native, other = (story(monkeypatch, roomy, inside=inside, total=8 * 10**9) for inside in (True, False))
    assert native == other


def test_what_captured_steps_keep_is_room_of_the_engine(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that fills the card stands, whoever has the memory of its graphs."""
    for inside in (True, False):
        with monkeypatch.context() as context:
            card = Backend(context, roomy, inside=inside)
            painter_of(roomy).memory.offload()
            made = MemoryPlan(painter_of(roomy).model.sizes, asked(roomy), frozenset(), 1)
            assert made.step.graph
            card.total = made.peak
            with nearly_full(True):
                draw(roomy)
            assert roomy.plan == made
            draw(roomy)
            assert roomy.plan == made


def test_an_audit_under_either_allocator_finds_what_was_not_planned(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for inside in (True, False):
        with monkeypatch.context() as context:
            card = Backend(context, roomy, inside=inside)
            draw(roomy)
            before = card.counters
            context.setattr(streams_module, "counters", lambda d, b=before: b)
            context.setattr(memory_manager, "counters", lambda d, b=before: Counters(b.allocated, b.reserved + 10**9))
            with pytest.warns(MemoryPressureWarning, match=r"reserve 1\.00 GB more, which was not planned"):
                draw(roomy)
            painter_of(roomy).memory.offload()
