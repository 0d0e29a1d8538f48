"""What users rely on, on the miniature here and at full size on a GPU (marker `gpu`).

The full-size model is built with random weights by tools/benchmarks/full_size.py, or that of $VORTEX_FULL_SIZE_MODEL.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_parts import forget_prompts, painter_of

from vortex_core import Engine, NoEffectWarning, PromptTruncatedWarning, load_flux_schnell
from vortex_core.device.vram import snapshot
from vortex_core.runtime.graphs import BoundStep

MB, GB = 10**6, 10**9
PROMPT = "a green ring in the center of a yellow background"


@dataclass
class Actor:
    """An engine and the size it draws in these tests."""

    engine: Engine
    size: int
    full: bool

    def draw(self, prompt: str = PROMPT, **kwargs: object) -> torch.Tensor:
        return self.engine.generate(prompt, **{"height": self.size, "width": self.size, "seed": 1, **kwargs})

    def allocated(self) -> int:
        return snapshot(self.engine.device).allocated


@pytest.fixture(scope="module", params=["miniature", pytest.param("full size", marks=pytest.mark.gpu)])
def actor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actor]:
    if request.param == "miniature":
        yield Actor(request.getfixturevalue("engine"), 128, full=False)
        return
    folder = Path(os.environ.get("VORTEX_FULL_SIZE_MODEL", tmp_path_factory.getbasetemp() / "full"))
    if not folder.exists():
        import full_size

        full_size.build(folder)
    with load_flux_schnell(folder, device="cuda") as engine:
        yield Actor(engine, 512, full=True)


def test_the_smallest_pictures(actor: Actor) -> None:
    for side in (64, 96):
        picture = actor.draw(height=64, width=side, batch_size=2)
        assert picture.shape == (2, 64, side, 3)
        assert picture.isfinite().all()


def test_standard_actor_generation(actor: Actor) -> None:
    actor.draw()
    if actor.full:
        torch.cuda.reset_peak_memory_stats()
    before = actor.allocated()
    picture = actor.draw()
    assert picture.shape == (1, actor.size, actor.size, 3)
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.max() <= 1
    if actor.full:
        added = torch.cuda.max_memory_allocated() - before
        reserved = torch.cuda.max_memory_reserved()
        print(f"\n{actor.engine.name} adds {added / GB:.3f} GB, reserved peak {reserved / GB:.2f} GB")
        assert added < 0.5 * GB
        assert reserved < 6.5 * GB


def test_negative_prompt_application(actor: Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    step = BoundStep.__call__
    monkeypatch.setattr(BoundStep, "__call__", lambda *arguments: passes.append(1) or step(*arguments))  # or a replay
    plain = actor.draw()
    with pytest.warns(NoEffectWarning, match="no effect"):
        negative = actor.draw(negative_prompt="a blue square")
    assert torch.equal(plain, negative)
    assert len(passes) == 2 * 4  # no second pass a step


def test_vram_budget_compliance(actor: Actor) -> None:
    weights = actor.engine.step_time_bytes
    print(f"\nstep-time weights {weights / GB:.3f} GB", end="")
    if actor.full:
        loaded = snapshot(actor.engine.device)
        print(f", allocated {loaded.allocated / GB:.2f}, reserved {loaded.reserved / GB:.2f} GB", end="")
        assert weights <= 4.95 * GB
        assert loaded.allocated <= 6.5 * GB
    # 4.5 bits a parameter, a little more for what stays unquantized
    values = sum(
        2 * m.packed.numel() for m in painter_of(actor.engine).model.transformer.modules() if hasattr(m, "packed")
    )
    assert values * 0.5625 < weights < values * 0.5625 * (1.02 if actor.full else 1.15)


def test_deterministic_output(actor: Actor) -> None:
    first, again, other = actor.draw(seed=5), actor.draw(seed=5), actor.draw(seed=6)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 16 / 255


def test_preallocated_buffer_output(actor: Actor) -> None:
    expected = actor.draw()
    out = torch.full((1, actor.size, actor.size, 3), torch.nan, device=actor.engine.device)
    pointer = out.data_ptr()
    before = actor.allocated()
    returned = actor.draw(out=out)
    assert returned is out
    assert out.data_ptr() == pointer
    assert torch.equal(out, expected)
    assert actor.allocated() == before


def test_long_prompt_truncation(actor: Actor) -> None:
    clip_cut = " ".join(["red"] * 100) + " with a hidden tail"
    with pytest.warns(PromptTruncatedWarning, match="77 tokens.* without: 'red .*with a hidden tail'"):
        actor.draw(clip_cut)
    t5_cut = " ".join(["red"] * 300) + " with a lost tail"
    with pytest.warns(PromptTruncatedWarning, match="256 tokens.* Lost: 'red .*with a lost tail'"):
        long = actor.draw(t5_cut)
    with pytest.warns(PromptTruncatedWarning):
        longer = actor.draw(t5_cut + " and even more")
    assert torch.equal(long, longer)  # what is said to be lost is lost
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actor.draw("red " * 20)


@pytest.mark.slow
def test_batch_generation_memory_leak(actor: Actor) -> None:
    import psutil

    process = psutil.Process()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for seed in range(3):
        actor.draw(seed=seed, batch_size=2)
    before = (actor.allocated(), tensors(), process.memory_info().rss)
    for seed in range(10):
        actor.draw(seed=seed, batch_size=2)
    after = (actor.allocated(), tensors(), process.memory_info().rss)
    assert after[0] - before[0] < 50 * MB
    assert after[1] <= before[1]
    assert after[2] - before[2] < 50 * MB


@pytest.mark.gpu
def test_offloading_frees_what_it_says_and_comes_back_the_same(tiny_dir: Path) -> None:
    engine = load_flux_schnell(tiny_dir, device="cuda")
    expected = engine.generate(PROMPT, seed=1)
    before, graphs = snapshot(engine.device), engine.ledger.graphs  # which are reserved, and no tensor's
    said = engine.device_bytes
    assert engine.offload() == said
    after = snapshot(engine.device)
    assert said - graphs <= before.allocated - after.allocated < said * 1.05 + MB
    assert said <= before.reserved - after.reserved
    assert engine.ledger.graphs == 0
    assert not engine.resident
    assert engine.offload() == 0
    forget_prompts(engine)
    assert torch.equal(engine.generate(PROMPT, seed=1), expected)
    assert engine.resident
    engine.unload()


def test_offloading_on_the_cpu_does_nothing(engine: Engine) -> None:
    assert engine.offload() == engine.device_bytes == 0
    assert engine.resident
