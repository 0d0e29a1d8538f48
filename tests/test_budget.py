"""The budget on the CPU, which stands for a card here: placements, slices, refusals.

On a GPU: tools/benchmarks/vram_contract.py.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_parts import forget_prompts, painter_of

from vortex_core import (
    Engine,
    MemoryPressureError,
    MemoryPressureWarning,
    VortexInitializationError,
    VortexInputError,
    load_flux_schnell,
)
from vortex_core.device.vram import Counters, Snapshot
from vortex_core.memory.planner import BLOCKS, MemoryPlan, MemoryRequirements, placements, smallest_budget
from vortex_core.memory.planner import PROMPT as PROMPT_GROUPS
from vortex_core.runtime import loading, memory_manager
from vortex_core.runtime.loading import check_budget

GB = 1e9
PROMPT = "a green ring"
SIZE = {"height": 64, "width": 96}
AMPLE = 2.0  # GB, with room for the miniature and everything


@pytest.fixture(scope="module")
def planned(tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=AMPLE) as engine:
        yield engine


@pytest.fixture
def roomy(planned: Engine) -> Iterator[Engine]:
    """An engine with an ample budget, to be narrowed by a test."""
    yield planned
    forget_prompts(planned)
    painter_of(planned).memory.budget = AMPLE * GB


def asked(engine: Engine, batch: int = 1) -> MemoryRequirements:
    return painter_of(engine).model.requirements(*SIZE.values(), batch)


def narrow(engine: Engine, batch: int = 1, spare: int = 0) -> None:
    """Give the engine the smallest budget that draws `SIZE`, and `spare` bytes."""
    painter_of(engine).memory.budget = smallest_budget(painter_of(engine).model.sizes, asked(engine, batch)) + spare


def test_with_an_ample_budget_everything_is_resident(roomy: Engine, engine: Engine) -> None:
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), engine.generate(PROMPT, seed=1, **SIZE))
    assert roomy.plan is not None
    assert not roomy.plan.streamed
    assert roomy.plan.peak <= AMPLE * GB


def test_pieces_are_sized_as_they_turn_out(roomy: Engine) -> None:
    assert {group.name: group.nbytes for group in painter_of(roomy).model.groups} == {
        group.name: group.nbytes for group in painter_of(roomy).model.groups
    }


@pytest.mark.slow
def test_every_placement_draws_the_same_bit_for_bit(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    latents: list[torch.Tensor] = []
    draw = dict(seed=3, on_step=lambda i, n, clean: latents.append(clean) if i == n else None, **SIZE)
    pictures = [roomy.generate(PROMPT, **draw)]
    tried = placements(painter_of(roomy).model.sizes)
    for streamed in (*tried, *reversed(tried)):
        with monkeypatch.context() as context:
            context.setattr(
                memory_manager, "make_plan", lambda p, request, limit, *now, s=streamed: MemoryPlan(p, request, s, 1)
            )
            forget_prompts(roomy)
            painter_of(roomy).memory.budget += 1  # so that it is planned anew
            pictures.append(roomy.generate(PROMPT, **draw))
        assert {group.name for group in painter_of(roomy).model.groups if group.device is None} == streamed
    assert len(set(tried)) == len(tried) > 4
    assert all(torch.equal(pictures[0], picture) for picture in pictures)
    assert all(torch.equal(latents[0], last) for last in latents)


def test_a_model_loaded_small_draws_the_same(tiny_dir: Path, roomy: Engine) -> None:
    native = painter_of(roomy).model.requirements(roomy.native_size, roomy.native_size, 1)
    least = max(smallest_budget(painter_of(roomy).model.sizes, request) for request in (native, asked(roomy)))
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=(least + 1) / GB) as small:
        assert small.plan is not None
        assert {"modulation", "clip", "t5"}.isdisjoint(group.part for group in small.plan.resident)
        assert any(group.part == BLOCKS for group in small.plan.groups if group.name in small.plan.streamed)
        assert torch.equal(small.generate(PROMPT, seed=1, **SIZE), roomy.generate(PROMPT, seed=1, **SIZE))


def test_the_same_request_is_planned_once(roomy: Engine) -> None:
    roomy.generate(PROMPT, seed=1, **SIZE)
    made = roomy.plan
    roomy.generate(PROMPT, seed=1, steps=1, height=128, width=128)
    assert roomy.plan is not made
    roomy.generate(PROMPT, seed=2, **SIZE)
    assert roomy.plan is made
    narrow(roomy)
    roomy.generate(PROMPT, seed=2, **SIZE)
    assert roomy.plan != made


def test_batches_are_drawn_in_slices(roomy: Engine, engine: Engine) -> None:
    seen = []
    groups, request = painter_of(roomy).model.groups, asked(roomy, 3)
    streamed = frozenset(group.name for group in groups if group.part in PROMPT_GROUPS)
    painter_of(roomy).memory.budget = MemoryPlan(groups, request, streamed, 2).peak
    pictures = roomy.generate(PROMPT, seed=5, batch_size=3, on_step=lambda *step: seen.append(step), **SIZE)
    assert (roomy.plan.slice, roomy.plan.streamed) == (2, streamed)
    singles = torch.cat([engine.generate(PROMPT, seed=seed, **SIZE) for seed in (5, 6, 7)])
    assert torch.equal(pictures[2], singles[2])  # one at a time is what a single picture is
    torch.testing.assert_close(pictures, singles, atol=1e-4, rtol=0)
    assert [(i, n, len(clean)) for i, n, clean in seen] == [(i, 4, 3) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, -math.inf])
def test_impossible_budgets_are_refused(budget: float) -> None:
    with pytest.raises(VortexInputError, match=r"vram_budget .*and finite, not|vram_budget must be more than 0 GB"):
        load_flux_schnell("tiny", device="cpu", vram_budget=budget)


@pytest.mark.parametrize("budget", ["6.5", True, [6.5]])
def test_budgets_are_numbers(budget: object) -> None:
    with pytest.raises(VortexInputError, match=r"number of GB \(10\^9 bytes\), such as 6.5, and finite, not "):
        load_flux_schnell("tiny", device="cpu", vram_budget=budget)


def test_a_budget_larger_than_the_card_is_refused() -> None:
    with pytest.raises(VortexInputError, match=r"is 13 GB, but the card has 12.00 GB. Name at most 11.0"):
        check_budget(13, 12 * 10**9)
    assert check_budget(12, 12 * 10**9) == 12 * 10**9


def test_the_default_budget_suits_the_card() -> None:
    assert check_budget(None, None) is None
    assert check_budget(None, 24 * 10**9) == 6.5e9
    assert check_budget(None, 6 * 10**9) == 5e9


def test_a_budget_too_small_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "fill", lambda *a: pytest.fail("read before refusing"))
    with pytest.raises(
        VortexInputError, match=r"0.01 GB is too small for tiny-schnell.* 128 x 128 takes 0\.\d+ GB, 64"
    ):
        load_flux_schnell("tiny", device="cpu", vram_budget=0.01)


def test_a_picture_too_large_is_refused_before_any_work(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(roomy)
    with monkeypatch.context() as context:
        context.setattr(
            type(painter_of(roomy).conditioner), "__call__", lambda *a: pytest.fail("worked before refusing")
        )
        with pytest.raises(
            MemoryPressureError, match=r"not fit: 1 of 2048 x 1024.*\(.*arena.*smallest budget"
        ) as error:
            roomy.generate(PROMPT, seed=1, height=1024, width=2048)
    assert error.value.needed > error.value.available == roomy.budget
    assert sum(error.value.breakdown.values()) == error.value.needed
    assert roomy.generate(PROMPT, seed=1, **SIZE).isfinite().all()


class Card:
    """The free memory of a card, for an engine that believes to be on one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: float) -> None:
        self.free = free
        monkeypatch.setattr(memory_manager, "available", lambda device, own=0: self.free)
        monkeypatch.setattr(loading, "available", lambda device, own=0: self.free)


def test_what_others_took_tightens_the_plan(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = roomy.generate(PROMPT, seed=1, **SIZE)
    least = smallest_budget(painter_of(roomy).model.sizes, asked(roomy))
    roomy.generate(PROMPT, seed=1, height=64, width=64)  # another size is planned anew
    card = Card(monkeypatch, least)
    with pytest.warns(MemoryPressureWarning, match=r"0.00 GB left at the peak of 0\.\d+ GB"):
        assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), expected)
    assert roomy.plan.peak <= least
    card.free = least - 1
    with pytest.raises(MemoryPressureError, match="does not fit"):
        roomy.generate(PROMPT, seed=1, **SIZE)
    card.free = AMPLE * GB
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), expected)


def test_a_card_without_room_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, free=10**7)
    monkeypatch.setattr(loading, "fill", lambda *a: pytest.fail("read before refusing"))
    monkeypatch.setattr(loading, "snapshot", lambda device: Snapshot(0, 0, None, free=10**7, total=8 * 10**9))
    monkeypatch.setattr(loading, "shortage", lambda device: "process 4711 holds 7.00 GB")
    with pytest.raises(
        VortexInitializationError,
        match=r"not enough VRAM to load on cpu: process 4711 holds 7.00 GB \(needed 0\.\d+ GB, free 0.01 GB, total",
    ):
        load_flux_schnell("tiny", device="cpu", vram_budget=AMPLE)


def out_of_memory_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, times: int) -> list[MemoryPlan]:
    """Have the decoder run out of memory so often; the plans that were tried."""
    plans: list[MemoryPlan] = []
    forward = painter_of(engine).model.decoder.forward

    def decode(*arguments: object) -> Iterator[torch.Tensor]:
        plans.append(engine.plan)
        if len(plans) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    monkeypatch.setattr(painter_of(engine).model.decoder, "forward", decode)
    return plans


def test_running_out_of_memory_once_is_survived_with_a_tighter_plan(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = roomy.generate(PROMPT, seed=1, **SIZE)
    plans = out_of_memory_at(roomy, monkeypatch, times=1)
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), expected)
    assert plans[1].peak < plans[0].peak


def test_running_out_of_memory_twice_is_an_error_and_the_engine_goes_on(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = roomy.generate(PROMPT, seed=1, **SIZE)
    with monkeypatch.context() as context:
        plans = out_of_memory_at(roomy, context, times=2)
        with pytest.raises(MemoryPressureError, match=r"ran out, twice: 1 of 96 x 64: needed") as error:
            roomy.generate(PROMPT, seed=1, **SIZE)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert len(plans) == 2
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), expected)


def test_running_out_of_memory_while_moving_offloads(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = roomy.generate(PROMPT, seed=1, **SIZE)
    narrow(roomy)
    roomy.generate(PROMPT, seed=1, **SIZE)
    painter_of(roomy).memory.budget = AMPLE * GB

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as context:
        context.setattr(type(painter_of(roomy).model.groups[-1]), "to_device", full)
        with pytest.raises(MemoryPressureError, match="Memory ran out: 1 of 96 x 64"):
            roomy.generate(PROMPT, seed=1, **SIZE)
    assert not roomy.resident
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), expected)
    assert roomy.resident


def test_offloading_and_resuming_draws_the_same(roomy: Engine) -> None:
    expected = roomy.generate(PROMPT, seed=1, **SIZE)
    before = painter_of(roomy).memory.components
    assert sum(before.values()) > 10**6
    painter_of(roomy).memory.offload()
    assert not any(painter_of(roomy).memory.components.values())
    roomy.resume()
    weights = {name: size for name, size in before.items() if name not in ("arena", "libraries")}
    assert {name: painter_of(roomy).memory.components[name] for name in weights} == weights
    forget_prompts(roomy)
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), expected)


def test_threads_take_turns_within_a_budget(roomy: Engine) -> None:
    def draw(seed: int) -> torch.Tensor:
        return roomy.generate(PROMPT, seed=seed, **SIZE)

    narrow(roomy)
    expected = list(map(draw, (1, 2)))
    with ThreadPoolExecutor() as pool:
        assert all(map(torch.equal, pool.map(draw, (1, 2)), expected))


def test_latents_decode_as_they_were_drawn(roomy: Engine) -> None:
    seen = []
    picture = roomy.generate(PROMPT, seed=1, on_step=lambda i, n, clean: seen.append(clean), **SIZE)
    assert torch.equal(roomy.decode(seen[-1]), picture)


def test_latents_of_other_sizes_decode_within_a_budget(roomy: Engine, engine: Engine) -> None:
    latents = torch.randn(1, 16, 9, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(roomy.decode(latents), engine.decode(latents))


def test_a_new_limit_holds_from_the_next_call_on(roomy: Engine) -> None:
    roomy.generate(PROMPT, seed=1, **SIZE)
    roomy.limit(0.5)
    assert roomy.budget == 0.5e9
    with pytest.raises(VortexInputError, match="more than 0 GB"):
        roomy.limit(-1)
    roomy.limit(0.1)
    with pytest.raises(MemoryPressureError, match="does not fit"):
        roomy.generate(PROMPT, seed=1, **SIZE)


def test_an_unloaded_engine_holds_nothing(tiny_dir: Path) -> None:
    gone = load_flux_schnell(tiny_dir, device="cpu", vram_budget=AMPLE)
    gone.unload()
    assert (gone.resident, gone.device_bytes, gone.offload()) == (False, 0, 0)
    for ask in ("budget", "plan", "ledger", "pinned_bytes"):
        with pytest.raises(VortexInputError, match="was unloaded"):
            getattr(gone, ask)


def test_what_callers_let_go_is_handed_back_where_it_does_not_fit(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy.generate(PROMPT, seed=1, **SIZE)
    made, mine, foreign, given_back = roomy.plan, sum(painter_of(roomy).memory.components.values()), 10**9, []
    monkeypatch.setattr(memory_manager, "hand_back", given_back.append)
    for leftover, times in ((0, 0), (1, 1)):
        monkeypatch.setattr(
            memory_manager, "counters", lambda d, n=leftover: Counters(mine + foreign, made.peak + foreign + n)
        )
        painter_of(roomy).memory._apply(made, AMPLE * GB)
        assert len(given_back) == times


def test_the_cap_is_the_budget_beside_what_is_there(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int | None] = []
    monkeypatch.setattr(memory_manager, "cap_process", lambda device, nbytes: told.append(nbytes))
    monkeypatch.setattr(memory_manager, "counters", lambda device: Counters(0, 10**9))
    painter_of(roomy).memory.cap()  # on the CPU there is nothing to cap
    assert told == []
    with monkeypatch.context() as context:
        context.setattr(painter_of(roomy).memory, "device", torch.device("cuda", 0))
        painter_of(roomy).memory.cap()
        monkeypatch.setattr(
            memory_manager, "counters", lambda device: Counters(0, 3 * 10**9)
        )  # by then it is the engine's
        painter_of(roomy).memory.limit(GB)  # the cap goes with the budget
        painter_of(roomy).memory.cap(on=False)
        painter_of(roomy).memory.cap(on=False)
        painter_of(roomy).memory.limit(AMPLE * GB)
    assert told == [10**9 + AMPLE * GB, 2 * 10**9, None]


def test_what_was_not_planned_is_said(roomy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter((10**9, 2 * 10**9, 2 * 10**9))
    monkeypatch.setattr(memory_manager, "counters", lambda device: Counters(10**9, next(reserved)))
    with pytest.warns(MemoryPressureWarning, match=r"reserve 1.00 GB more, which was not planned; now.*cached 1.00"):
        roomy.generate(PROMPT, seed=1, **SIZE)
