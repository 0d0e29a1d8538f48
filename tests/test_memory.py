"""The memory of an engine: one block laid out by offset, sessions that find all in it, plans that stand, and a card.

On the CPU, which stands for one: what would be reserved is what the engine has, by its own account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_parts import forget_prompts, painter_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vortex_core import Engine, MemoryPressureError, MemoryPressureWarning, VortexInitializationError, load_flux_schnell
from vortex_core.device import streams as streams_module
from vortex_core.device import vram
from vortex_core.device.vram import Counters, Ledger, Snapshot
from vortex_core.flux1 import conditioning
from vortex_core.flux1.transformer import Transformer
from vortex_core.memory.arena import ALIGN, MIB, Region, block
from vortex_core.memory.planner import BLOCKS, MemoryPlan, MemoryRequirements, smallest_budget
from vortex_core.runtime import graphs, loading, memory_manager
from vortex_core.runtime import painter as painter_module
from vortex_core.runtime.graphs import BoundStep, GraphCache

GB = 1e9
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PROMPT = "a green ring"
SIZE = {"height": 64, "width": 96}
AMPLE = 2.0  # GB, with room for the miniature and everything


@pytest.fixture(scope="module")
def loaded(tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=AMPLE) as engine:
        yield engine


@pytest.fixture
def roomy(loaded: Engine) -> Iterator[Engine]:
    """An engine with an ample budget and nothing of earlier tests, to be narrowed by a test."""
    painter_of(loaded).memory.offload()
    yield loaded
    forget_prompts(loaded)
    painter_of(loaded).memory.budget = AMPLE * GB


def asked(engine: Engine, batch: int = 1) -> MemoryRequirements:
    return painter_of(engine).model.requirements(*SIZE.values(), batch)


def narrow(engine: Engine, batch: int = 1) -> None:
    """Give the engine the smallest budget that draws `SIZE`."""
    painter_of(engine).memory.budget = smallest_budget(painter_of(engine).model.sizes, asked(engine, batch))


def draw(engine: Engine, seed: int = 1, **options: Any) -> Tensor:
    return engine.generate(PROMPT, seed=seed, **{**SIZE, "steps": 2, **options})


def streams(engine: Engine) -> bool:
    """Whether blocks stream."""
    return any(group.part == BLOCKS and group.name in engine.plan.streamed for group in engine.plan.groups)


# The arena.


def test_a_region_gives_tensors_apart_and_says_where_it_ends() -> None:
    memory = block(3 * ALIGN + 8, CPU).zero_()
    assert (memory.dtype, memory.shape, block(0, CPU).nbytes) == (torch.uint8, (3 * ALIGN + 8,), 0)
    region = Region(memory, ALIGN)
    first = region.take((2, 3), torch.float32)
    assert region.used == 2 * ALIGN
    second = region.take((ALIGN // 2,), torch.bfloat16)
    last = region.take((8,), torch.uint8)
    for tensor, start in ((first, ALIGN), (second, 2 * ALIGN), (last, 3 * ALIGN)):
        assert tensor.is_contiguous()
        assert tensor.data_ptr() - memory_manager.data_ptr() == start
    first.fill_(1), second.fill_(2), last.fill_(3)
    assert (first.sum(), second.sum(), last.sum()) == (6, ALIGN, 24)
    assert not memory[:ALIGN].any()
    with pytest.raises(ValueError, match=rf"too small: {4 * ALIGN + 1} of {3 * ALIGN + 8} bytes"):
        region.take((1,), torch.uint8)
    whole = Region(memory)
    assert whole.take((3 * ALIGN + 8,), torch.uint8).data_ptr() == memory_manager.data_ptr()


# Sessions.


@pytest.mark.parametrize("tight", [False, True])
@torch.inference_mode()
def test_a_session_lays_everything_out_apart(roomy: Engine, monkeypatch: pytest.MonkeyPatch, tight: bool) -> None:
    if tight:
        narrow(roomy)
    held, took = painter_of(roomy).memory, list[Tensor]()
    take = Region.take

    def taken(region: Region, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = take(region, shape, dtype)
        if region.memory.untyped_storage().data_ptr() == held.arena.data_ptr():  # not host memory
            took.append(found)
        return found

    monkeypatch.setattr(Region, "take", taken)
    with held.session(asked(roomy)) as place:
        assert streams(roomy) == tight
        scratch = len(took)
        with place.prompt():
            prompt = took[scratch:]
            apart([*took[:scratch], *prompt], held.arena)
        assert bool(prompt) == tight  # which are staging's
        del took[scratch:]
        with place.steps(64, 96, 256, rounds=4):
            latents = place.latents((1, 16, 8, 12), (1, 24, 64))
            apart(took, held.arena)
            assert sum(tensor.nbytes for tensor in took) > 0.9 * (place.plan.arena - 2 * MIB)
        with pytest.raises(ValueError, match="too small"):
            place.latents((1, 16, 8, 12), (2, 24, 64), (1, 2**20))
        for tensor in latents:  # the decoder has all but them
            assert tensor.data_ptr() >= place.maps.data_ptr() + place.maps.nbytes
        assert place.maps.nbytes >= place.plan.requirements.decode
    assert place.plan.peak <= held.budget


def apart(tensors: list[Tensor], block: Tensor) -> None:
    """Check that none of them overlap, that each lies in the block, and as kernels want it."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert block.data_ptr() <= spans[0][0]
    assert spans[-1][1] <= block.data_ptr() + block.nbytes
    assert all((start - block.data_ptr()) % ALIGN == 0 for start, _ in spans)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tight", [False, True])
def test_nothing_is_read_that_this_call_has_not_written(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch, tight: bool, batch: int
) -> None:
    if tight:
        narrow(roomy, batch)
    given: list[Tensor] = []
    expected = draw(roomy, batch_size=batch, on_step=lambda i, n, clean: given.append(clean))
    kept = [clean.clone() for clean in given]
    assert streams(roomy) == tight
    held, phases = painter_of(roomy).memory, []

    @torch.inference_mode()
    def poison(phase: str, memory: Tensor) -> None:
        memory.fill_(0xFF)  # NaN in every type
        phases.append(phase)

    encode, decode = conditioning.Conditioner.__call__, painter_module.decode

    def encoded(*arguments: Any) -> Any:
        poison("prompt", held.arena)
        found = encode(*arguments)
        poison("steps", held.arena)
        return found

    def decoded(decoder: Any, latents: Tensor, pictures: Tensor, rows: int | None, maps: Tensor) -> Tensor:
        poison("decode", maps)
        return decode(decoder, latents, pictures, rows, maps)

    poison("before", held.arena), poison("before", held.library)
    assert torch.equal(draw(roomy, batch_size=batch), expected)
    monkeypatch.setattr(conditioning.Conditioner, "__call__", encoded)
    monkeypatch.setattr(painter_module, "decode", decoded)
    forget_prompts(roomy)
    assert torch.equal(draw(roomy, batch_size=batch), expected)
    assert phases == ["before", "before", "prompt", "steps", "decode"]
    assert all(map(torch.equal, given, kept))  # what callers were handed is theirs
    assert not any(map(torch.equal, given[:-1], given[1:]))


def test_a_smaller_picture_works_in_the_same_arena(roomy: Engine) -> None:
    small, large = draw(roomy, height=64, width=64), draw(roomy, height=128, width=128)
    place = painter_of(roomy).memory.arena.data_ptr()
    with torch.inference_mode():
        painter_of(roomy).memory.arena.fill_(0xFF)
    assert torch.equal(draw(roomy, height=64, width=64), small)
    assert torch.equal(draw(roomy, height=128, width=128), large)
    assert painter_of(roomy).memory.arena.data_ptr() == place


def test_what_libraries_allocate_in_is_lent_while_they_run(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    held, seen = painter_of(roomy).memory, dict[str, int]()
    encode, denoise, decode = (
        type(painter_of(roomy).conditioner)._table,
        painter_module.sampling.denoise,
        painter_module.decode,
    )

    def look(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*arguments: Any) -> Any:
            seen[name] = held.library.nbytes
            return work(*arguments)

        return looked

    monkeypatch.setattr(type(painter_of(roomy).conditioner), "_table", look("prompt", encode))
    monkeypatch.setattr(BoundStep, "run", look("launches", BoundStep.run))
    monkeypatch.setattr(painter_module.sampling, "denoise", look("steps", denoise))
    monkeypatch.setattr(painter_module, "decode", look("decode", decode))
    draw(roomy)
    assert roomy.plan.library > 0
    assert seen == {"prompt": 0, "steps": roomy.plan.library, "launches": 0, "decode": 0}
    assert held.library.nbytes == held.components["libraries"] == roomy.plan.library


def test_after_an_error_the_next_call_takes_it_back(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, held = draw(roomy), painter_of(roomy).memory

    def broken(*arguments: object) -> Iterator[Tensor]:
        raise ZeroDivisionError

    with monkeypatch.context() as context:
        context.setattr(painter_of(roomy).model.decoder, "forward", broken)
        with pytest.raises(ZeroDivisionError):
            draw(roomy)
    assert held.library.nbytes == 0  # its traceback may keep tensors alive
    assert held.arena.nbytes == roomy.plan.arena
    assert torch.equal(draw(roomy), expected)
    assert held.library.nbytes == roomy.plan.library


def test_inside_a_session_weights_are_decoded_into_the_arena(roomy: Engine) -> None:
    held = painter_of(roomy).memory
    backend = held.backend
    assert backend is not None

    def where() -> int:
        packed, absmax = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 1)
        return backend.dequantize(packed, absmax, torch.float32).data_ptr()

    with torch.inference_mode(), held.session(asked(roomy)):
        assert where() == held.arena.data_ptr()
    with torch.inference_mode(), held.session(painter_of(roomy).model.decode_requirements(8, 8, 1)):
        assert where() != held.arena.data_ptr()  # there the decoder's maps lie


def test_running_out_of_memory_gives_back_all_before_the_second_try(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, held, hand_back = draw(roomy), painter_of(roomy).memory, memory_manager.hand_back
    first, gone = StorageWeakRef(held.arena.untyped_storage()), []
    forward = painter_of(roomy).model.decoder.forward

    def decode(*arguments: object) -> Iterator[Tensor]:
        if not gone:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    def handed_back(device: torch.device) -> None:
        gone.append(first.expired())
        hand_back(device)

    monkeypatch.setattr(painter_of(roomy).model.decoder, "forward", decode)
    monkeypatch.setattr(memory_manager, "hand_back", handed_back)
    assert torch.equal(draw(roomy), expected)
    assert all(gone)
    assert gone


# Plans that stand.


class Card:
    """A card with so many bytes left for an engine, which believes to be on it; `plans` counts how often it planned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: float, why: str = "") -> None:
        self.free, self.plans = free, 0
        self._plan = memory_manager.make_plan
        for module in (memory_manager, loading):
            monkeypatch.setattr(module, "available", lambda device, own=0: int(self.free))
            monkeypatch.setattr(module, "shortage", lambda device, own=0: why)
        monkeypatch.setattr(memory_manager, "make_plan", self.plan)

    def plan(self, *arguments: Any, **options: Any) -> MemoryPlan | None:
        self.plans += 1
        return self._plan(*arguments, **options)


def nearly_full(expected: bool) -> AbstractContextManager[Any]:
    return pytest.warns(MemoryPressureWarning, match="GB left at the peak") if expected else nullcontext()


def test_an_engine_short_of_free_memory_plans_once(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(roomy)
    least = smallest_budget(painter_of(roomy).model.sizes, asked(roomy))
    draw(roomy, height=64, width=64)
    card = Card(monkeypatch, free=least)
    with nearly_full(True):
        assert torch.equal(draw(roomy), expected)
    assert card.plans == 1
    assert streams(roomy)
    made = roomy.plan
    for _ in range(5):  # without a plan, a move or a warning
        assert torch.equal(draw(roomy), expected)
    assert (card.plans, roomy.plan) == (1, made)
    card.free = least + memory_manager.SPARE  # a little more is worth no move
    draw(roomy)
    assert (card.plans, roomy.plan) == (1, made)

    card.free = AMPLE * GB - 1  # still below the budget
    assert torch.equal(draw(roomy), expected)
    assert card.plans == 2
    assert not streams(roomy)
    for _ in range(5):
        assert torch.equal(draw(roomy), expected)
    assert card.plans == 2

    card.free = roomy.plan.peak  # others took it, and it is enough
    draw(roomy)
    assert card.plans == 2
    card.free -= 1
    with nearly_full(True):
        assert torch.equal(draw(roomy), expected)
    assert card.plans == 3


def test_with_the_whole_budget_free_nobody_asks_the_card(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(roomy)
    draw(roomy, height=64, width=64)
    card = Card(monkeypatch, free=AMPLE * GB)
    draw(roomy)
    assert card.plans == 1
    monkeypatch.setattr(memory_manager, "available", lambda device, own=0: pytest.fail("asked"))
    draw(roomy)
    assert card.plans == 1


def test_an_engine_comes_back_to_what_others_left(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(roomy)
    painter_of(roomy).memory.offload()
    card = Card(monkeypatch, free=smallest_budget(painter_of(roomy).model.sizes, asked(roomy)))
    with nearly_full(True):
        roomy.resume()
    assert roomy.resident
    away = {group.name for group in painter_of(roomy).model.groups if group.device is None}
    assert away & {group.name for group in roomy.plan.groups if group.part == BLOCKS}
    assert torch.equal(draw(roomy), expected)
    assert roomy.plan.streamed == away  # nothing moved once more
    painter_of(roomy).memory.offload()
    card.free = AMPLE * GB
    roomy.resume()
    assert all(group.device is not None for group in painter_of(roomy).model.groups)
    assert torch.equal(draw(roomy), expected)


def test_an_engine_that_cannot_come_back_stays_offloaded(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(roomy)
    painter_of(roomy).memory.offload()
    last = painter_of(roomy).model.groups[-1]

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as context:
        context.setattr(last, "to_device", full)
        with pytest.raises(MemoryPressureError, match="Memory ran out"):
            roomy.resume()
    assert not roomy.resident
    assert sum(painter_of(roomy).memory.components.values()) == 0
    roomy.resume()
    assert torch.equal(draw(roomy), expected)


# Who is named where memory is missing.

CAPPED = "this process is capped at 0.10 GB (torch.cuda.set_per_process_memory_fraction), whatever the card has free"


def test_a_capped_process_is_named_where_a_picture_does_not_fit(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw(roomy)
    draw(roomy, height=64, width=64)
    card = Card(monkeypatch, free=0.1 * GB, why=CAPPED)
    with pytest.raises(MemoryPressureError, match=r"available 0\.10 GB\. Of the card: this process is capped") as error:
        draw(roomy)
    assert CAPPED in error.value.remedy
    assert error.value.available == 0.1 * GB < error.value.needed
    card.free = AMPLE * GB
    assert torch.equal(draw(roomy), expected)
    painter_of(roomy).memory.budget = 0.1 * GB  # which the cap has nothing to do with
    with pytest.raises(MemoryPressureError) as error:
        draw(roomy)
    assert "capped" not in str(error.value)


def test_a_capped_process_is_named_where_a_model_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, free=0.1 * GB, why=CAPPED)
    monkeypatch.setattr(loading, "fill", lambda *a: pytest.fail("read before refusing"))
    with pytest.raises(
        VortexInitializationError, match=r"not enough VRAM to load on cpu: .*capped at 0\.10 GB"
    ) as error:
        load_flux_schnell("tiny", device="cpu", vram_budget=AMPLE)
    assert CAPPED in str(error.value)
    assert error.value.free == 0.1 * GB


def test_what_torch_knows_of_a_cap_reaches_the_error(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's own functions, with nothing of Vortex replaced but the device that it asks about."""
    draw(roomy, height=64, width=64)
    own = sum(painter_of(roomy).memory.components.values())
    stats = {"allocated_bytes": {"all": {"current": own}}, "reserved_bytes": {"all": {"current": own}}}
    for name, answer in {
        "memory_stats_as_nested_dict": stats,
        "mem_get_info": (140 * 10**9, 150 * 10**9),
        "get_per_process_memory_fraction": 0.1 / 150,
        "get_device_name": "NVIDIA H200",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer, raising=False)
    monkeypatch.setattr(vram, "holders", lambda device: [])
    monkeypatch.setattr(memory_manager, "available", lambda device, own: vram.available(CUDA, own))
    monkeypatch.setattr(memory_manager, "shortage", lambda device, own: vram.shortage(CUDA, own))
    with pytest.raises(MemoryPressureError, match=r"available 0\.10 GB") as error:
        draw(roomy)
    assert CAPPED in error.value.remedy


# Allocators.


class Backend:
    """torch's counters under one of its allocators: what captured steps keep is in `reserved`, or the driver's.

    A captured step runs what it captured, and keeps what was planned for it; all share a pool.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, *, inside: bool) -> None:
        self.engine, self.inside, self.kept, self.total = engine, inside, 0, 8 * 10**9
        self.told: list[object] = []
        model = painter_of(engine).model
        monkeypatch.setattr(model, "fused", True)
        monkeypatch.setattr(model, "_known", {})
        monkeypatch.setattr(Transformer, "fused", property(lambda transformer: True))
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
        size = step._size
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
