"""Captured steps: found by size and address, replayed bit for bit, in parts where blocks stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from engine_parts import painter_of
from step_parts import CPU, region, request, size_of
from torch import Tensor

from vortex_core import Engine, load_flux_schnell
from vortex_core.flux1.transformer import Transformer
from vortex_core.memory.arena import Region
from vortex_core.memory.offload import Prefetcher
from vortex_core.memory.planner import smallest_budget
from vortex_core.runtime.graphs import BoundStep, GraphCache, PiecewiseGraph, step_bytes


@torch.inference_mode()
def test_a_replay_reads_its_inputs_and_lays_out_no_step(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, (first, second) = size_of(128, 80, 2), [request(engine, 128, 80, 2) for _ in range(2)]
    second[0].neg_()
    memory = torch.empty(step_bytes(painter_of(engine).model.flux, size, torch.float32), dtype=torch.uint8)
    captured = BoundStep(transformer, size, Region(memory))
    captured(*first)
    graph = SimpleNamespace(replay=captured.run)  # in that memory, whoever filled it
    monkeypatch.setattr(Transformer, "step", lambda *arguments: pytest.fail("laid out"))
    replayed = BoundStep(transformer, size, Region(memory))(*second, graph=graph).clone()
    monkeypatch.undo()
    assert torch.equal(replayed, transformer(*second))


class Captures:
    """A card that captures: what is launched for a graph runs when that is replayed, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[tuple[int, int, int]] = []
        self.replays = 0
        monkeypatch.setattr(Transformer, "on_card", property(lambda transformer: True))
        monkeypatch.setattr(GraphCache, "_record", lambda graphs, step, prefetcher: self.record(step))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

    def record(self, step: BoundStep) -> SimpleNamespace:
        self.captured.append(step._size)

        def replay() -> None:
            self.replays += 1
            step.run()

        return SimpleNamespace(replay=replay)


@torch.inference_mode()
def test_a_graph_is_found_at_the_addresses_it_was_captured_with_alone(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, graphs = Captures(monkeypatch), GraphCache(transformer, CPU)
    size, arguments = size_of(128, 80, 1), request(engine, 128, 80, 1)
    first, second, expected = region(engine, size), region(engine, size), transformer(*arguments)

    def draw(memory: torch.Tensor, address: tuple[int, ...], start: int = 0) -> int:
        """How many were captured so far."""
        velocity = graphs.open(size, Region(memory, start), Prefetcher([], CPU), lambda: address)
        assert torch.equal(velocity(*arguments), expected)
        return len(card.captured)

    assert [draw(first.memory, (1, 2)) for _ in range(3)] == [1, 1, 1]
    assert card.replays == 2
    assert draw(first.memory, (1, 3)) == 2  # weights moved, or cuBLAS' workspaces
    assert graphs.sizes == (size,)  # what nobody can find any more is gone
    assert draw(second.memory, (1, 3)) == 3  # the arena moved
    longer = torch.cat((torch.empty(256, dtype=torch.uint8), second.memory))
    assert draw(longer, (1, 3), 256) == 4  # staging or decoded weights grew before it
    assert draw(longer, (1, 3), 256) == 4
    graphs.clear()
    assert (graphs.sizes, graphs.nbytes) == ((), 0)
    assert draw(longer, (1, 3), 256) == 5


@torch.inference_mode()
def test_the_graphs_of_the_sizes_drawn_last_are_kept(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Captures(monkeypatch)
    graphs, lent = GraphCache(transformer, CPU), []
    largest = size_of(128, 80, 3)
    img, txt, modulation, pe = request(engine, 128, 80, 3)
    memory = region(engine, largest).memory

    @contextmanager
    def lend() -> Iterator[None]:
        lent.append(1)
        yield

    monkeypatch.setattr("vortex_core.runtime.graphs.KEPT", 2)
    for counts in ((3, 2), (3,), (1,)):
        velocity = graphs.open(largest, Region(memory), Prefetcher([], CPU), tuple, lend)
        for count in counts:
            velocity(img[:count], txt[:count], modulation, pe)
    assert [size[0] for size in graphs.sizes] == [3, 1]
    assert len(lent) == 3  # what is replayed needs no memory of libraries


def test_a_piecewise_graph_replays_graphs_and_what_the_host_does_between(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Graph:
        names = iter("abc")

        def capture_begin(self, pool: str, capture_error_mode: str) -> None:
            self.name = next(self.names)
            told.append(f"{pool}: {self.name} begins")

        def capture_end(self) -> None:
            told.append(f"{self.name} ends")

        def replay(self) -> None:
            told.append(self.name)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    recording = PiecewiseGraph("pool")
    with recording.capture():
        recording.between(lambda: told.append("fetch"))
        recording.between(lambda: told.append("leave"))
    assert told == ["pool: a begins", "a ends", "pool: b begins", "b ends", "pool: c begins", "c ends"]
    told.clear()
    recording.replay()
    recording.replay()
    assert told == ["a", "fetch", "b", "leave", "c"] * 2
    Graph.names = iter("de")
    with pytest.raises(ValueError, match="no"), PiecewiseGraph("pool").capture():
        raise ValueError("no")
    assert told[-1] == "d ends"  # or nothing else could be captured

    errors = iter(["it is broken", "nothing is captured"])

    def fails(graph: Graph) -> None:
        raise RuntimeError(next(errors))

    monkeypatch.setattr(Graph, "capture_end", fails)
    recording = PiecewiseGraph("pool")
    with pytest.raises(RuntimeError, match="it is broken"), recording.capture():
        recording.between(lambda: None)
    assert next(errors, None) is None


@torch.inference_mode()
def test_a_capture_that_fails_leaves_no_graph_and_no_pool(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, graphs = Captures(monkeypatch), GraphCache(transformer, CPU)
    size, arguments = size_of(128, 80, 2), request(engine, 128, 80, 2)
    velocity = graphs.open(size, region(engine, size), Prefetcher([], CPU))
    one = (arguments[0][:1], arguments[1][:1], *arguments[2:])
    expected = velocity(*one).clone()
    assert graphs.sizes == (size_of(128, 80, 1),)
    pools = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(1) or object())
    with monkeypatch.context() as context:

        def fails(step: BoundStep) -> SimpleNamespace:
            raise KeyboardInterrupt

        context.setattr(card, "record", fails)
        with pytest.raises(KeyboardInterrupt):
            velocity(*arguments)
    assert (graphs.sizes, graphs.nbytes) == ((), 0)
    before = len(pools)
    assert torch.equal(velocity(*one), expected)
    assert len(pools) == before + 1  # the old one may be none any more
    assert torch.equal(velocity(*one), expected)
    assert card.replays == 1


@torch.inference_mode()
def test_slices_of_several_sizes_share_a_region(engine: Engine, transformer: Transformer) -> None:
    graphs = GraphCache(transformer, CPU)
    img, txt, modulation, pe = request(engine, 128, 80, 3)
    size = size_of(128, 80, 2)
    velocity = graphs.open(size, region(engine, size), Prefetcher([], CPU))
    parts = [velocity(part, txt[: len(part)], modulation, pe).clone() for part in img.split(2)]
    assert torch.equal(parts[1], transformer(img[2:], txt[:1], modulation, pe))
    assert torch.equal(parts[0], transformer(img[:2], txt[:2], modulation, pe))
    assert (graphs.nbytes, graphs.sizes) == (0, ())  # nothing is captured on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_replayed_steps_are_the_launched_ones_bit_for_bit(mode: str) -> None:
    """Sizes, prompts and seeds take turns; then again without graphs, and after the weights were away."""
    jobs = [
        {"prompt": prompt, "seed": seed, "height": height, "width": width, "batch_size": batch}
        for seed, (height, width, batch) in enumerate([(128, 128, 1), (64, 96, 2), (256, 128, 1)])
        for prompt in ("a blue square", "two red circles")
    ]
    with load_flux_schnell("tiny", device="cuda", mode=mode) as engine:
        assert engine.mode == mode
        graphs, memory = painter_of(engine).memory.graphs, painter_of(engine).memory

        def drawn() -> list[Tensor]:
            return [engine.generate(**job) for job in jobs]

        largest = engine.generate("a ring", seed=0, height=256, width=256, batch_size=2)  # so that the block stays
        drawn()
        kept, place = dict(graphs._graphs), memory.arena.data_ptr()
        replayed = drawn()
        assert len(engine.captured) == 4
        assert memory.arena.data_ptr() == place
        assert dict(graphs._graphs) == kept  # nothing was captured again
        torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's graphs do, for the whole process
        filled = [torch.full((2**25,), torch.nan, device="cuda") for _ in range(3)]  # where they were
        assert all(map(torch.equal, drawn(), replayed))
        assert all(bool(tensor.isnan().all()) for tensor in filled)
        assert dict(graphs._graphs).items().isdisjoint(kept.items())
        del filled
        engine.offload()
        assert not engine.captured
        assert graphs.nbytes == 0
        assert all(map(torch.equal, drawn(), replayed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GraphCache, "_capture", lambda *arguments: None)
            graphs.clear()
            assert all(map(torch.equal, drawn(), replayed))
        assert torch.equal(engine.generate("a ring", seed=0, height=256, width=256, batch_size=2), largest)


@pytest.mark.gpu
def test_a_captured_step_can_be_cancelled_between_steps() -> None:
    def stop(i: int, n: int, clean: Tensor) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with load_flux_schnell("tiny", device="cuda") as engine:
        engine.warmup()
        expected = engine.generate("a blue square", seed=1)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a blue square", seed=1, on_step=stop)
        assert torch.equal(engine.generate("a blue square", seed=1), expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*CUDA Graph is empty")
def test_blocks_that_stream_are_captured_in_parts_and_draw_the_same() -> None:
    jobs = [{"seed": seed, "height": side, "width": side} for seed, side in enumerate((128, 64, 128, 64))]

    def stop(i: int, n: int, clean: Tensor) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with load_flux_schnell("tiny", device="cuda") as engine:
        graphs = painter_of(engine).memory.graphs._graphs

        def drawn() -> list[Tensor]:
            return [engine.generate("a blue square", **job) for job in jobs]

        expected = drawn()
        asked = painter_of(engine).model.requirements(128, 128, 1, blas=painter_of(engine).memory.blas)
        painter_of(engine).memory.budget = smallest_budget(painter_of(engine).model.sizes, asked)
        assert all(map(torch.equal, drawn(), expected))
        steps, kept = painter_of(engine).memory.placement.steps, dict(graphs)
        assert len(kept) == 2
        assert len(steps.groups) > 1
        assert {len(recording._parts) for recording in kept.values()} == {4 * len(steps.groups) + 1}
        assert all(map(torch.equal, drawn(), expected))
        assert graphs == kept  # nothing was captured again
        engine.offload()
        assert not graphs
        assert all(map(torch.equal, drawn(), expected))
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a blue square", **jobs[0], on_step=stop)
        assert torch.equal(engine.generate("a blue square", **jobs[0]), expected[0])
