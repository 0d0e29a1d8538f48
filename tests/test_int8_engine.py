"""Whole engines in int8: on the CPU in plain torch, and on a GPU that tells it is an RTX 30."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import judge
import pytest
import scenes
import torch
from torch import Tensor

from vortex_core import Engine, load_flux_schnell
from vortex_core.errors import VortexInputError
from vortex_core.memory.planner import smallest_budget

AMPERE = (8, 6)
SHARED = 99 * 1024  # bytes of shared memory that a program may take on compute capability 8.6
# modules that ask for the card
CARDS = ("convolution", "decoder_attention", "fp8_attention", "int8_product", "launch", "weights")
NEAR = 1.0  # of 255, in the mean: how far a picture may be from that of `exact`


def cases(count: int) -> list[tuple[scenes.Scene, str]]:
    """Scenes that training never saw, and their captions."""
    draw = random.Random(9_001)
    found = [scenes.sample_held_out(draw, 1 + i % 2) for i in range(count)]
    return [(scene, scenes.caption(scene, draw)) for scene in found]


def apart(one: Tensor, other: Tensor) -> float:
    """Of 255, in the mean."""
    return float((one - other).abs().mean()) * 255


def assert_as_good(int8: Engine, exact: Engine, count: int) -> None:
    """Pictures are near each other, and as many of int8's are right but for one."""
    right = {"int8": 0, "exact": 0}
    for seed, (scene, caption) in enumerate(cases(count)):
        pictures = {
            name: engine.generate(caption, seed=seed)[0].cpu() for name, engine in (("int8", int8), ("exact", exact))
        }
        assert 0 < apart(*pictures.values()) < NEAR
        for name, picture in pictures.items():
            right[name] += judge.matches(picture, scene).ok
    assert right["exact"] >= count - 1
    assert right["int8"] >= right["exact"] - 1


# On the CPU


@pytest.fixture(scope="module")
def int8() -> Iterator[Engine]:
    with load_flux_schnell("tiny", device="cpu", mode="int8") as engine:
        yield engine


def test_int8_draws_what_exact_draws(int8: Engine, engine: Engine) -> None:
    assert (int8.mode, int8.precision, int8.precision_reason) == ("int8", "int8", "asked for")
    assert_as_good(int8, engine, 6)
    first = int8.generate("a red circle", seed=3)
    assert torch.equal(first, int8.generate("a red circle", seed=3))


def test_int8_rounds_less_than_fp8(int8: Engine, engine: Engine) -> None:
    """Over half of a thousandth of 255 and under half of fp8's: it is 8 bits that are compared, and not 16."""
    with load_flux_schnell("tiny", device="cpu", mode="fp8") as fp8:
        assert fp8.precision == "fp8"
        for seed in range(2):
            expected = engine.generate("a blue square above a green star", seed=seed)
            off = [
                apart(other.generate("a blue square above a green star", seed=seed), expected) for other in (int8, fp8)
            ]
            assert 5e-4 < off[0] < 0.5 * off[1]


def test_a_batch_in_int8_is_its_pictures(int8: Engine) -> None:
    both = int8.generate("a yellow ring", seed=5, batch_size=2, height=64, width=80)
    for i, picture in enumerate(both):
        assert apart(picture, int8.generate("a yellow ring", seed=5 + i, height=64, width=80)[0]) < 0.1


def test_fast_is_exact_on_the_cpu_as_before(engine: Engine) -> None:
    with load_flux_schnell("tiny", device="cpu", mode="exact") as exact:
        assert (engine.mode, engine.precision) == (exact.mode, exact.precision) == ("exact", "exact")
        assert torch.equal(engine.generate("a red circle", seed=1), exact.generate("a red circle", seed=1))


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_a_mode_that_cannot_run_is_refused_by_name(mode: str) -> None:
    with pytest.raises(VortexInputError, match=f"mode '{mode}' does not work here: it multiplies NF4 weights") as error:
        load_flux_schnell("tiny", device="cpu", quantization="none", mode=mode)
    assert str(error.value).endswith("'fast' takes the fastest mode that does. Leave `quantization` at 'nf4'.")


# On a GPU


@pytest.fixture
def rtx_30(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that tells compute capability 8.6: no fp8, no copy engine, no early launch, and less shared memory.

    Triton still compiles for the GPU that is there, since it asked before. What is chosen for a card is forgotten.
    """
    import triton

    from vortex_core import kernels
    from vortex_core.kernels import fused
    from vortex_core.kernels.card import card
    from vortex_core.runtime import modes

    def forget() -> None:
        for found in (kernels._broken, modes._fp8_broken):
            found.cache_clear()

    assert fused.dequantize is not None  # the modules below are imported
    triton.runtime.driver.active.get_current_target()
    known = card(torch.device("cuda", 0))
    told = known._replace(copies=False, early=False, shared=min(known.shared, SHARED))
    for name in CARDS:
        monkeypatch.setattr(sys.modules[f"vortex_core.kernels.{name}"], "card", lambda device: told)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: AMPERE)
    forget()
    yield
    forget()


@pytest.mark.gpu
@pytest.mark.usefixtures("rtx_30")
def test_a_card_without_fp8_loads_plans_captures_and_draws_in_int8(tiny_dir: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with load_flux_schnell(tiny_dir, device="cuda") as engine:
        assert (engine.mode, engine.precision) == ("fast", "int8")
        assert engine.precision_reason == (
            "the only one in 8 bits that runs here; "
            "fp8 declined: fp8 needs compute capability 8.9, and this card has 8.6"
        )
        first = engine.generate("a red circle", seed=1)
        assert engine.captured == ((1, 256, 64),)
        assert engine.budget is not None
        assert torch.cuda.max_memory_reserved() - others <= engine.plan.peak <= engine.budget
        assert torch.equal(first, engine.generate("a red circle", seed=1))  # replayed
        with load_flux_schnell(tiny_dir, device="cuda", mode="exact") as exact:
            assert_as_good(engine, exact, 6)
        engine.offload()
        assert torch.equal(first, engine.generate("a red circle", seed=1))
        assert engine.generate("a red circle", seed=1, batch_size=2, height=64, width=80).isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("rtx_30")
def test_a_card_without_fp8_refuses_it_by_name_and_streams_in_int8(tiny_dir: Path) -> None:
    with pytest.raises(VortexInputError, match=r"'fp8' does not work here: fp8 needs compute capability 8\.9"):
        load_flux_schnell(tiny_dir, device="cuda", mode="fp8")
    with load_flux_schnell(tiny_dir, device="cuda", mode="int8") as engine:
        expected = engine.generate("a red circle", seed=1)
        engine.limit((smallest_budget(engine.plan.groups, engine.plan.requirements) + 1e6) / 1e9)
        assert torch.equal(engine.generate("a red circle", seed=1), expected)
        assert any(name.startswith("single_blocks") for name in engine.plan.streamed)
        assert engine.plan.peak <= (engine.budget or 0)
        assert engine.captured == ((1, 256, 64),)  # in parts
