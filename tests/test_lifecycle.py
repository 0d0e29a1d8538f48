"""An engine's life: what is left after unload, faults at every stage, lost devices, forks, and all of it at once."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import pickle
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import painter_of
from torch import Tensor

import vortex_core
from vortex_core import (
    BusyError,
    DeadlineError,
    DeviceLostError,
    Engine,
    MemoryPressureError,
    NotFiniteError,
    VortexError,
    VortexInputError,
    load_flux_schnell,
)
from vortex_core.cli.png import encode
from vortex_core.device import finite, worker
from vortex_core.flux1 import conditioning, transformer, vae
from vortex_core.memory import offload
from vortex_core.memory.planner import smallest_budget
from vortex_core.runtime import painter

PROMPT = "a yellow square"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}
TIMES = int(os.environ.get("VORTEX_STORM", "40"))  # calls of all at once, about


def draw(engine: Engine, seed: int = 1, **options: Any) -> Tensor:
    return engine.generate(PROMPT, seed=seed, **{**SMALL, **options})


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


@pytest.fixture
def alone(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine on a worker of its own, which a test may break."""
    monkeypatch.setattr(worker, "_workers", {})
    with load_flux_schnell(tiny_dir, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def own(tiny_dir: Path) -> Iterator[Engine]:
    """One that may be planned anew."""
    with load_flux_schnell(tiny_dir, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def streaming(tiny_dir: Path) -> Iterator[Engine]:
    """One whose blocks do not fit its budget."""
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=0.5) as loaded:
        draw(loaded)
        loaded.limit((smallest_budget(painter_of(loaded).model.sizes, loaded.plan.requirements) + 1000) / 1e9)
        draw(loaded)
        assert loaded.plan.streamed
        yield loaded


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


# Faults


def held() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors = [tensor for tensor in tensors if not tensor.is_meta and tensor.layout is torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


STAGES: dict[str, tuple[object, str, int]] = {  # what breaks, and at which call
    "encode": (conditioning.Conditioner, "_table", 1),
    "step 2": (transformer.Transformer, "forward", 2),
    "copy of a streamed block": (offload.CopyStream, "copy", 3),
    "decode": (vae.Decoder, "forward", 1),
    "copy out": (finite.Verdicts, "check", 1),
}


class Fault:
    """Raises `error` at the nth call of a function, `times` times; else the function does what it does."""

    def __init__(
        self, patch: pytest.MonkeyPatch, stage: str, error: Callable[[], BaseException], times: int = 1
    ) -> None:
        where, name, first = STAGES[stage]
        real, self.calls = getattr(where, name), 0

        def function(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if first <= self.calls < first + times:
                raise error()
            return real(*arguments, **options)

        patch.setattr(where, name, function)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_after_a_fault_the_next_picture_is_right_and_memory_is_back(
    own: Engine, streaming: Engine, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = streaming if "streamed" in stage else own
    prompt = f"a prompt for {stage}"  # which is encoded now
    expected = draw(engine)
    for kind in (RuntimeError, MemoryError):
        before = held()
        with monkeypatch.context() as patch:
            fault = Fault(patch, stage, kind)
            if kind is MemoryError and engine is own:  # tried again
                assert engine.generate(prompt, seed=1, **SMALL).isfinite().all()
            else:
                with pytest.raises(MemoryPressureError if kind is MemoryError else kind):
                    engine.generate(prompt, seed=1, **SMALL)
            assert fault.calls
        assert torch.equal(draw(engine), expected)
        while len(painter_of(engine).conditioner._cache) > 1:
            painter_of(engine).conditioner._cache.popitem(last=False)
        if kind is not MemoryError:  # blocks that have streamed stay in host memory, too
            assert held() <= before


@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory"]
)
def test_memory_that_runs_out_twice_is_our_error_in_whatever_words(
    own: Engine, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(own)
    with monkeypatch.context() as patch:
        Fault(patch, "decode", lambda: RuntimeError(words), times=2)
        with pytest.raises(MemoryPressureError, match="Memory ran out, twice"):
            draw(own)
    assert torch.equal(draw(own), expected)


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


# Pictures that are not finite


def test_a_picture_that_is_not_finite_is_an_error(alone: Engine) -> None:
    expected = draw(alone)
    bias = painter_of(alone).model.decoder.conv_out.bias
    good = bias.clone()
    with torch.inference_mode():
        bias[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"picture of seed 1 is not finite .*Damaged weights"):
        draw(alone)
    with pytest.raises(NotFiniteError, match="picture of these latents is not finite"):
        alone.decode(torch.zeros(1, 16, 8, 8))
    with torch.inference_mode():
        bias.copy_(good)
    assert torch.equal(draw(alone), expected)
    with pytest.raises(NotFiniteError, match="The picture is not finite"):
        encode(expected[0] * float("nan"), {})


def test_weights_that_are_not_finite_are_found_where_a_prompt_is_encoded(alone: Engine) -> None:
    with torch.inference_mode():
        painter_of(alone).model.modulation.final_layer.adaLN_modulation[1].bias[0] = float("nan")
    with pytest.raises(NotFiniteError, match="modulation of the Conditioning is not finite"):
        alone.encode("a prompt that nobody has asked for")


def test_on_a_gpu_the_log_tells_when_the_picture_is_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[bool] = []

    class Event:
        def query(self) -> bool:
            return bool(done)

    class Stream:
        def record_event(self) -> Event:
            return Event()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(finite, "host_buffer", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    verdicts = finite.Verdicts(torch.device("cuda", 0))
    verdicts.check(torch.full((2, 2), float("nan")), "The first")
    verdicts.check(torch.ones(2, 2), "The second")
    verdicts.tell()
    assert not caplog.records
    done.append(True)
    verdicts.tell()
    verdicts.tell()
    assert [(record.levelno, record.message[:23]) for record in caplog.records] == [
        (logging.ERROR, "The first is not finite")
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_values_are_finite(dtype: torch.dtype) -> None:
    values = torch.full((4096,), 60_000.0, dtype=dtype)
    finite.check_finite(values, "It")
    values[7] = float("inf")
    with pytest.raises(NotFiniteError, match="It is not finite"):
        finite.check_finite(values, "It")


# All at once


@pytest.mark.slow
def test_whatever_happens_at_once_each_result_is_its_own(tiny_dir: Path) -> None:
    """16 threads and a loop of tasks, seeded: every kind of call, cancelled, late and broken at random moments."""
    wrong: list[object] = []
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=0.5) as engine:
        prompts = [f"a picture of {n}" for n in range(4)]
        known = {prompt: engine.encode(prompt, 1) for prompt in prompts}
        small = {"height": 64, "width": 64, "steps": 1}
        latents = [torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        pictures = {
            (prompt, seed): engine.generate(prompt, seed=seed, **small) for prompt in prompts for seed in (1, 2)
        }
        decoded = [engine.decode(some) for some in latents]

        def one(rng: random.Random) -> None:
            prompt, seed, n = rng.choice(prompts), rng.choice((1, 2)), rng.randrange(4)
            kind, expected = rng.randrange(9), pictures[prompt, seed]
            options: dict[str, Any] = {**small, "seed": seed}
            if kind in (0, 1):
                out = torch.empty_like(expected) if kind else None
                same(engine.generate(rng.choice((prompt, known[prompt])), out=out, **options), expected)
            elif kind == 2:
                same(engine.decode(latents[n]), decoded[n])
            elif kind == 3:
                same(engine.encode(prompt, 1).modulation, known[prompt].modulation)
            elif kind == 4:
                engine.limit(rng.choice((0.33, 0.5, 3.0)))
            elif kind == 5:
                engine.offload()
                engine.resume()
            elif kind == 6:
                with suppress(DeadlineError):
                    same(engine.generate(prompt, deadline=rng.uniform(1e-5, 0.3), **options), expected)
            elif kind == 7:

                def on_step(*step: Any) -> None:
                    raise ZeroDivisionError(seed)

                with pytest.raises(ZeroDivisionError):
                    engine.generate(prompt, on_step=on_step, **options)
            else:
                with pytest.raises(VortexInputError):
                    engine.generate(prompt, seed=-1)

        def same(found: Tensor, expected: Tensor) -> None:
            if not torch.equal(found, expected):
                wrong.append("another's")

        def several(name: int) -> None:
            rng = random.Random(name)
            for _ in range(max(1, TIMES // 16)):
                try:
                    one(rng)
                except BaseException as error:
                    wrong.append(error)

        async def task(rng: random.Random) -> None:
            prompt, seed = rng.choice(prompts), rng.choice((1, 2))
            call = asyncio.ensure_future(engine.agenerate(prompt, seed=seed, **small))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.uniform(0, 0.2))
                call.cancel()
            with suppress(asyncio.CancelledError):
                same(await call, pictures[prompt, seed])

        async def tasks() -> None:
            rng = random.Random(99)
            await asyncio.gather(*(task(rng) for _ in range(max(4, TIMES // 4))))

        threads = [threading.Thread(target=several, args=(name,)) for name in range(16)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive()
        assert wrong == []
        assert engine._worker._stack == engine._worker._queue == []
        prompt = prompts[0]
        assert torch.equal(engine.generate(prompt, seed=1, **small), pictures[prompt, 1])
        pool = ThreadPoolExecutor(16)
        last = [pool.submit(engine.generate, prompt, seed=1, **small) for _ in range(16)]
    for call in last:  # unloaded meanwhile
        error = call.exception(30)
        if error is None:
            assert torch.equal(call.result(), pictures[prompt, 1])
        else:
            assert isinstance(error, VortexInputError), error
    pool.shutdown()
