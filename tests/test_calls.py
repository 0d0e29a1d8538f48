"""Calls from threads, event loops and callbacks on one engine or several: in order, cancelled, late, interrupted."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vortex_core import DeadlineError, Engine, NoEffectWarning, VortexInputError, load_flux_schnell
from vortex_core.utils.timing import Stopwatch

PROMPT = "a green ring"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}
TIMES = int(os.environ.get("VORTEX_STORM", "40"))  # of each way in which a call may end


@pytest.fixture(scope="module")
def other(tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", quantization="none") as loaded:
        yield loaded


def draw(engine: Engine, seed: int = 1, **options: Any) -> Tensor:
    return engine.generate(PROMPT, seed=seed, **{**SMALL, **options})


@pytest.mark.slow
def test_pictures_of_many_threads_are_those_of_one(engine: Engine, other: Engine) -> None:
    jobs = [(which, seed) for seed in range(8) for which in (engine, other)]
    expected = [draw(*job) for job in jobs]
    with ThreadPoolExecutor(16) as pool:
        assert all(map(torch.equal, pool.map(lambda job: draw(*job), jobs), expected))


def test_on_step_runs_on_the_callers_thread_in_its_context(engine: Engine) -> None:
    said: ContextVar[int] = ContextVar("said", default=0)
    threads: list[threading.Thread] = []

    def on_step(i: int, n: int, clean: Tensor) -> None:
        threads.append(threading.current_thread())
        said.set(said.get() + 1)
        assert torch.is_inference_mode_enabled()

    draw(engine, on_step=on_step)
    assert threads == [threading.current_thread()] * 2
    assert said.get() == 2
    with Stopwatch(engine.device) as watch:
        draw(engine)
    assert list(watch.phases) == ["prompt", "prepare", "step 1", "step 2", "decode"]


def test_on_step_may_use_another_engine(engine: Engine, other: Engine) -> None:
    expected, inner = draw(engine), draw(other)
    seen: list[Tensor] = []
    assert torch.equal(draw(engine, on_step=lambda *step: seen.append(draw(other))), expected)

    def from_a_thread(*step: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(draw(other)))
        thread.start()
        thread.join()

    assert torch.equal(draw(engine, steps=2, on_step=from_a_thread), expected)
    assert len(seen) == 4
    assert all(torch.equal(inner, picture) for picture in seen)


def test_on_step_may_not_unload_what_draws(engine: Engine) -> None:
    expected = draw(engine)
    with pytest.raises(VortexInputError, match="on_step may not use the engine that calls it"):
        draw(engine, on_step=lambda *step: engine.unload())
    assert torch.equal(draw(engine), expected)


def test_warnings_name_the_line_of_the_caller(engine: Engine) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.generate(" ".join(["red"] * 100), "blue", seed=1, **SMALL)
    assert {warning.filename for warning in told} == {__file__}
    assert NoEffectWarning in {warning.category for warning in told}


def test_a_deadline_ends_a_picture_and_the_next_is_right(engine: Engine) -> None:
    expected = draw(engine)
    with pytest.raises(DeadlineError, match=r"deadline of 0\.0001 s"):
        draw(engine, deadline=1e-4)
    for wrong in (0, -1, float("nan"), float("inf"), "soon"):
        with pytest.raises(VortexInputError, match="deadline"):
            draw(engine, deadline=wrong)
    assert torch.equal(draw(engine, deadline=60), expected)


def test_a_coroutine_draws_the_same_and_the_loop_goes_on(engine: Engine) -> None:
    expected, ticks = draw(engine), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def main() -> list[Tensor]:
        ticking = asyncio.create_task(tick())
        pictures = await asyncio.gather(*(engine.agenerate(PROMPT, seed=1, **SMALL) for _ in range(4)))
        ticking.cancel()
        return pictures

    assert all(torch.equal(expected, picture) for picture in asyncio.run(main()))
    assert ticks > 4

    async def late() -> None:
        with pytest.raises(DeadlineError):
            await engine.agenerate(PROMPT, seed=1, deadline=1e-4, **SMALL)

    asyncio.run(late())


class Moments:
    """Delays up to a picture's time, so that what happens after them happens anywhere in it."""

    def __init__(self, engine: Engine) -> None:
        with Stopwatch(engine.device) as watch:
            draw(engine)
        self._random, self._most = random.Random(0), 1.2 * watch.seconds

    def __call__(self) -> float:
        return self._random.uniform(0, self._most)


def cancelled(engine: Engine, moment: Moments, held: Callable[[], Any]) -> None:
    async def one() -> None:
        thing = held()
        task = asyncio.create_task(engine.agenerate(PROMPT, seed=2, on_step=lambda *step: thing, **SMALL))
        await asyncio.sleep(moment())
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(one())


def late(engine: Engine, moment: Moments, held: Callable[[], Any]) -> None:
    thing = held()
    with suppress(DeadlineError):
        draw(engine, 2, on_step=lambda *step: thing, deadline=moment() + 1e-6)


def refused(engine: Engine, moment: Moments, held: Callable[[], Any]) -> None:
    thing, stop = held(), random.Random(moment()).randint(1, 2)

    def on_step(i: int, n: int, clean: Tensor) -> None:
        if i == stop:
            raise RuntimeError(f"no {thing}")

    with pytest.raises(RuntimeError, match="no <"):
        draw(engine, 2, on_step=on_step)


def interrupted(engine: Engine, moment: Moments, held: Callable[[], Any]) -> None:
    thing, stop = held(), random.Random(moment()).randint(1, 2)

    def on_step(i: int, n: int, clean: Tensor) -> None:
        if i == stop and thing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(engine, 2, on_step=on_step)


@pytest.mark.slow
@pytest.mark.parametrize("ends", [cancelled, late, refused, interrupted])
def test_whatever_ends_a_call_the_next_picture_is_right_and_nothing_is_held(tiny_dir: Path, ends: Any) -> None:
    """At random moments. What a job comes to, 200 times each, signals among it: test_worker_cancel.py."""

    class Thing:
        def __bool__(self) -> bool:
            return True

    refs: list[weakref.ref[Thing]] = []

    def held() -> Thing:
        thing = Thing()
        refs.append(weakref.ref(thing))
        return thing

    before = set(threading.enumerate())
    with load_flux_schnell(tiny_dir, device="cpu") as engine:
        expected, moment = draw(engine), Moments(engine)
        for i in range(TIMES):
            ends(engine, moment, held)
            if i % 10 == 0:
                assert torch.equal(draw(engine), expected)
        assert torch.equal(draw(engine), expected)
        gc.collect()
        assert len(refs) == TIMES
        assert not any(ref() is not None for ref in refs)
        added = {thread.name for thread in set(threading.enumerate()) - before}
        assert added <= {"vortex-cpu"}


def test_the_thread_ends_with_the_last_engine(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vortex_core.device import worker

    monkeypatch.setattr(worker, "_workers", {})  # apart from the engines of other tests
    before = set(threading.enumerate())
    first, second = (load_flux_schnell(tiny_dir, device="cpu") for _ in range(2))
    (thread,) = set(threading.enumerate()) - before
    first.unload()
    draw(second)
    assert thread.is_alive()
    second.unload()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(VortexInputError, match="was unloaded"):
        draw(second)
    with pytest.raises(VortexInputError):
        load_flux_schnell(tiny_dir, device="cpu", vram_budget=0.01)
    for left in set(threading.enumerate()) - before:
        left.join(5)
    assert set(threading.enumerate()) <= before
