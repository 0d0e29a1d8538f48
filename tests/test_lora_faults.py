"""LoRAs when something fails half-way, or memory is short: no picture is wrong afterwards, and nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import painter_of
from test_loras import NARROW, QKV, WIDE, drawn, lora, low, step_lora, use

from vortex_core import Engine, MemoryPressureError, VortexInputError, load_flux_schnell
from vortex_core.checkpoint.bundle import TINY
from vortex_core.memory.offload import WeightGroup
from vortex_core.memory.planner import smallest_budget
from vortex_core.quant.adapters import LoraFile, LoraPart, Magnitude
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.runtime import loras

pytestmark = pytest.mark.usefixtures("seeded")

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module", params=["exact", "fp8"])
def loaded(request: pytest.FixtureRequest, tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", mode=request.param, vram_budget=2) as engine:
        yield engine


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    use(loaded)
    yield loaded
    loaded.limit(2)
    use(loaded)


def wide() -> LoraFile:
    shapes = {NARROW: (256, 1024), QKV: (768, 256), WIDE: (1792, 256)}
    return lora(
        "wide", transformer=LoraPart(updates={name: (low((0, n), k, 1024),) for name, (n, k) in shapes.items()})
    )


def least(engine: Engine) -> float:
    return (smallest_budget(engine.plan.groups, engine.plan.requirements) + 2**20) / 1e9


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> Callable[[], None]:
    """Let a method of groups fail at its `at`-th call; returns what mends it."""
    original, calls = getattr(WeightGroup, name), []

    def method(self: WeightGroup, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) >= at:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(WeightGroup, name, method)
    return lambda: monkeypatch.setattr(WeightGroup, name, original)


def test_a_refused_set_leaves_the_gains_of_the_one_in_use(engine: Engine) -> None:
    magnitude = Magnitude(slice(0, 768), torch.rand(768) * 30 + 5, "output")
    dora = lora("dora", transformer=LoraPart(updates={QKV: (low((0, 768), 256),)}, row_scales={QKV: (magnitude,)}))
    use(engine, (dora, 1.0))
    expected = drawn(engine)
    engine.limit(least(engine))
    assert torch.equal(drawn(engine), expected)
    with pytest.raises(MemoryPressureError, match=r"needed (\S+) GB.* The smallest budget for it is \1 GB"):
        use(engine, (wide(), 1.0))
    assert torch.equal(drawn(engine), expected)
    assert painter_of(engine).loras.chosen[0][0] is dora


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, KeyboardInterrupt(), RuntimeError("a fault")], ids=repr)
@pytest.mark.parametrize(("method", "at"), [("relayout", 1), ("relayout", 3), ("visiting", 2)])
def test_after_an_error_half_way_everything_can_be_set_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, at: int, error: BaseException
) -> None:
    plain = drawn(engine)
    one, two = step_lora(1), lora("two", transformer=LoraPart(updates={QKV: (low((0, 768), 256, 40),)}))
    use(engine, (one, 1.0))
    expected = drawn(engine)
    mend = failing(monkeypatch, method, at, error)
    if method == "visiting" and engine.mode == "exact":
        return  # there are no scales to find
    wanted = MemoryPressureError if error is OUT_OF_MEMORY else type(error)
    with pytest.raises(wanted):
        use(engine, (two, 1.0), (step_lora(3, rank=40), 0.5))
    mend()
    assert torch.equal(drawn(engine), expected)  # the engine's own, which are set again
    use(engine)
    assert torch.equal(drawn(engine), plain)
    engine.limit(least(engine))
    assert torch.equal(drawn(engine), plain)  # and all groups can stream


def test_where_no_kernel_can_add_it_a_lora_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loras, "weights_declined", lambda device: "NVRTC does not load (no such file)")
    use(engine, (step_lora(), 1.0))  # this backend has none, and adds it by torch
    use(engine)
    monkeypatch.setattr(ReferenceBackend, "eight", True)
    with pytest.raises(VortexInputError, match=r"NVRTC does not load \(no such file\)\. Update torch"):
        use(engine, (step_lora(), 1.0))
    use(engine)


def test_memory_that_runs_out_once_is_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    use(engine, (step_lora(1), 1.0))
    expected = drawn(engine)
    use(engine)
    original, calls = WeightGroup.relayout, []

    def once(self: WeightGroup, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OUT_OF_MEMORY
        original(self, *arguments)

    monkeypatch.setattr(WeightGroup, "relayout", once)
    use(engine, (step_lora(1), 1.0))
    assert torch.equal(drawn(engine), expected)


def test_copies_that_cannot_be_packed_leave_an_engine_that_works(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load_flux_schnell(tiny_dir, device="cpu", mode="fp8", vram_budget=2) as engine:
        plain = drawn(engine)
        assert engine.plan.copies
        mend = failing(monkeypatch, "to_device", 2, OUT_OF_MEMORY)
        use(engine, (step_lora(1), 1.0))  # everything is offloaded, and it is set there
        mend()
        with_lora = drawn(engine)
        assert not torch.equal(with_lora, plain)
        assert engine.plan.copies
        use(engine)
        assert torch.equal(drawn(engine), plain)
        use(engine, (step_lora(1), 1.0))
        assert torch.equal(drawn(engine), with_lora)


def test_without_its_lora_an_engine_is_as_fast_as_before(tiny_dir: Path) -> None:
    with load_flux_schnell(tiny_dir, device="cpu", mode="fp8", vram_budget=2) as engine:
        drawn(engine)
        engine.limit(engine.plan.peak / 1e9)
        drawn(engine)
        before = engine.plan.copies, engine.plan.streamed
        use(engine, (wide(), 1.0))
        drawn(engine)
        assert engine.plan.streamed
        use(engine)
        drawn(engine)
        assert (engine.plan.copies, engine.plan.streamed) == before


def test_host_memory_does_not_grow_with_strengths_and_sizes(engine: Engine) -> None:
    one, placement, held = step_lora(1), painter_of(engine).memory.placement, []
    for i in range(4):
        use(engine, (one, 0.5 + i / 10))
        engine.limit(least(engine))
        drawn(engine)
        held.append(sum(memory._region.memory.numel() for memory in placement._host))
        engine.limit(2)
        drawn(engine)
    assert held[-1] <= held[0]


def test_an_unloaded_engine_holds_no_lora(tiny_dir: Path) -> None:
    engine = load_flux_schnell(tiny_dir, device="cpu")
    engine.set_loras([(TINY.with_name("tiny-outlines-lora.safetensors"), 1.0)])
    engine.unload()
    assert not engine._loras
    assert not engine._lora_files._read
