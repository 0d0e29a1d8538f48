"""An engine's life: what is left after unload, callers that wait for each other, lost devices and forks."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle_parts import PROMPT, SMALL, Fault, draw
from torch import Tensor

import vortex_core
from vortex_core import BusyError, DeviceLostError, Engine, VortexError, VortexInputError, load_flux_schnell
from vortex_core.device import worker
from vortex_core.runtime import painter


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def calls(engine: Engine) -> dict[str, Callable[[], Any]]:
    """Every way to have an engine do something."""
    config = json.loads((Path(vortex_core.__file__).parent / "assets/tiny-schnell/transformer/config.json").read_text())
    txt, pooled = torch.zeros(1, 4, config["joint_attention_dim"]), torch.zeros(1, config["pooled_projection_dim"])
    return {
        "generate": lambda: draw(engine),
        "agenerate": lambda: asyncio.run(engine.agenerate(PROMPT, seed=1, **SMALL)),
        "encode": lambda: engine.encode(PROMPT),
        "condition": lambda: engine.condition(txt, pooled),
        "decode": lambda: engine.decode(torch.zeros(1, 16, 8, 8)),
        "warmup": lambda: engine.warmup(64, 64),
        "limit": lambda: engine.limit(3),
        "resume": lambda: engine.resume(),
        "offload": lambda: engine.offload(),
    }


# Unloading


def test_once_it_is_unloaded_everything_says_so_or_tells_the_truth(alone: Engine) -> None:
    expected = {"resident": False, "device_bytes": 0}
    alone.unload()
    alone.unload()
    with alone:
        pass
    for name, kind in vars(Engine).items():
        if isinstance(kind, property) and not name.startswith("_"):
            if name in expected:
                assert getattr(alone, name) == expected[name]
            else:
                with pytest.raises(VortexInputError, match="was unloaded"):
                    getattr(alone, name)
    assert alone.offload() == 0
    for name, call in calls(alone).items():
        if name != "offload":
            with pytest.raises(VortexInputError, match="was unloaded"):
                call()


def test_who_waits_while_it_is_unloaded_is_told(alone: Engine) -> None:
    told: dict[str, object] = {}
    drawing, gate = threading.Event(), threading.Event()

    def tell(name: str, call: Callable[[], Any]) -> None:
        try:
            told[name] = call()
        except BaseException as error:
            told[name] = error

    def on_step(*step: Any) -> None:
        drawing.set()
        assert gate.wait(30)

    first = threading.Thread(target=tell, args=("first", lambda: draw(alone, on_step=on_step)))
    first.start()
    assert drawing.wait(30)
    waiting = {name: call for name, call in calls(alone).items() if name not in ("limit", "resume", "offload")}
    threads = [threading.Thread(target=tell, args=("unload", alone.unload))]
    threads += [threading.Thread(target=tell, args=("again", alone.unload))]
    threads += [threading.Thread(target=tell, args=item) for item in waiting.items()]
    for count, thread in enumerate(threads, 1):
        thread.start()
        until(lambda count=count: len(alone._worker._queue) == count)
    gate.set()
    for thread in (first, *threads):
        thread.join(30)
        assert not thread.is_alive()
    assert isinstance(told.pop("first"), Tensor)
    assert told.pop("unload") is told.pop("again") is None
    assert sorted(told) == sorted(waiting)
    for error in told.values():
        assert isinstance(error, VortexInputError)
        assert "was unloaded" in str(error)


def test_an_engine_that_nobody_has_any_more_still_draws_for_who_waits(tiny_dir: Path, engine: Engine) -> None:
    expected, pictures = draw(engine), []
    with ThreadPoolExecutor(4) as pool:
        loaded = load_flux_schnell(tiny_dir, device="cpu")
        pending = [pool.submit(draw, loaded) for _ in range(4)]
        del loaded
        gc.collect()
        pictures = [call.result(30) for call in pending]
    assert all(torch.equal(picture, expected) for picture in pictures)


# Waiting inside on_step


def test_a_call_that_on_step_waits_for_through_a_thread_is_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, told = draw(engine), []
    monkeypatch.setattr(worker, "HELD_UP", 0.3)
    monkeypatch.setattr(worker, "PATIENCE", 0.01)

    def call() -> None:
        with pytest.raises(BusyError, match=r"on_step of another call has not returned for 0\.3 s") as caught:
            engine.encode(PROMPT)
        told.append(caught.value.waiting)

    def on_step(*step: Any) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()

    assert torch.equal(draw(engine, on_step=on_step), expected)
    assert told == [1, 1]
    # of a coroutine it runs on the engine's thread, and then nobody is served
    assert torch.equal(asyncio.run(engine.agenerate(PROMPT, seed=1, on_step=on_step, **SMALL)), expected)
    assert told == [1, 1, 1, 1]


def test_who_waits_for_a_slow_on_step_is_served_when_it_returns(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(engine)
    monkeypatch.setattr(worker, "HELD_UP", 0.5)
    with ThreadPoolExecutor(1) as pool:
        pending: list[Any] = []

        def on_step(*step: Any) -> None:
            pending.append(pool.submit(draw, engine))
            threading.Event().wait(0.15)

        draw(engine, on_step=on_step)
        assert all(torch.equal(call.result(30), expected) for call in pending)


# Lost devices


def test_an_error_of_cuda_loses_the_device_and_a_new_engine_can_be_loaded(
    alone: Engine, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    engine, expected = alone, draw(alone)
    for stage in ("encode", "copy out"):
        with monkeypatch.context() as patch:
            Fault(patch, stage, lambda: kind("CUDA error: device-side assert triggered\nCompile with ..."))
            with pytest.raises(DeviceLostError, match="cpu has failed: CUDA error: device-side assert triggered") as e:
                engine.generate("another prompt", seed=1, **SMALL)
        assert isinstance(e.value.__cause__, kind)
        for name, call in calls(engine).items():
            if name not in ("limit", "resume", "offload"):  # which need no device here
                with pytest.raises(DeviceLostError, match="unload them, and load the model again"):
                    call()
        another = load_flux_schnell(tiny_dir, device="cpu")
        engine.unload()
        with pytest.raises(VortexInputError, match="was unloaded"):
            draw(engine)
        engine = another
        assert torch.equal(draw(engine), expected)
    engine.unload()


def test_all_engines_of_a_lost_device_say_so_and_who_waits_there(
    alone: Engine, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_flux_schnell(tiny_dir, device="cpu")
    monkeypatch.setattr(worker, "PATIENCE", 30)
    told: list[int] = []

    def call() -> None:
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            draw(other)
        told.append(1)

    threads = [threading.Thread(target=call) for _ in range(5)]

    def on_step(*step: Any) -> None:
        for count, thread in enumerate(threads, 1):
            thread.start()
            until(lambda count=count: len(other._worker._queue) == count)
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(DeviceLostError):
        draw(alone, on_step=on_step)
    for thread in threads:
        thread.join(30)
    assert len(told) == 5
    other.unload()


def test_unloading_works_though_the_device_fails_at_it(alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(painter, "hand_back", broken)
        alone.unload()
    with pytest.raises(VortexInputError, match="was unloaded"):
        draw(alone)


# Forks


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_at_once_and_may_load_anew(engine: Engine, tiny_dir: Path) -> None:
    """While another thread draws, whose locks nobody in the child will ever give back."""
    expected = draw(engine)
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            draw(engine, 3)

    thread = threading.Thread(target=go_on)
    thread.start()
    answer, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python's, for exactly this
        pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        found: list[object] = []
        try:
            for call in (lambda: draw(engine), lambda: engine.encode(PROMPT), lambda: engine.decode(expected)):
                try:
                    call()
                except VortexError as error:
                    found.append(str(error))
            engine.unload()
            with load_flux_schnell(tiny_dir, device="cpu") as another:
                found.append(torch.equal(draw(another), expected))
        finally:
            os.write(tell, pickle.dumps(found))
            os._exit(0)
    os.close(tell)
    with os.fdopen(answer, "rb") as pipe:
        told = pickle.load(pipe)  # noqa: S301
    os.waitpid(pid, 0)
    stop.set()
    thread.join(30)
    assert len(told) == 4
    assert all("a fork has left its thread behind" in text for text in told[:2])
    assert told[3] is True
    assert torch.equal(draw(engine), expected)
