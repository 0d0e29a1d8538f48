"""Plans that stand while others use the card, and who is named where memory is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_parts import painter_of
from memory_parts import AMPLE, CUDA, GB, asked, draw, nearly_full, streams

from vortex_core import Engine, MemoryPressureError, VortexInitializationError, load_flux_schnell
from vortex_core.device import vram
from vortex_core.memory.planner import BLOCKS, MemoryPlan, smallest_budget
from vortex_core.runtime import loading, memory_manager

CAPPED = "this process is capped at 0.10 GB (torch.cuda.set_per_process_memory_fraction), whatever the card has free"

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
