"""What a job asks its caller: where that runs, what it raises, and calls from in there."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
import traceback
import warnings
import weakref
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from worker_parts import CPU, TIMES, Thing, Tracked, until

from vortex_core.device import worker as module
from vortex_core.device.jobs import Cancelled, ask, inside, warn
from vortex_core.device.worker import Worker
from vortex_core.errors import BusyError, VortexWarning


def test_an_asked_function_runs_on_the_callers_thread_in_its_own_context(worker: Worker) -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    seen: list[Any] = []

    def on_step(step: int) -> int:
        seen.append((threading.get_ident(), torch.is_inference_mode_enabled(), variable.get()))
        variable.set(step)
        return step * 10

    assert worker.run(lambda: [ask(on_step, step) for step in (1, 2, 3)]) == [10, 20, 30]
    assert seen == [(threading.get_ident(), True, before) for before in (0, 1, 2)]
    assert variable.get() == 3
    assert not torch.is_inference_mode_enabled()


def test_without_a_job_it_runs_right_there() -> None:
    assert ask(divmod, 7, 2) == (3, 1)


def test_of_a_coroutine_it_runs_on_the_worker_in_a_copy_of_the_context(worker: Worker) -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    owner = Thing()

    def on_step() -> tuple[int, bool]:
        variable.set(variable.get() + 1)
        assert worker.run(lambda: 4) == 4
        return threading.get_ident(), inside(owner)

    def call() -> tuple[Any, int, int]:
        return ask(on_step), variable.get(), threading.get_ident()

    async def main() -> Any:
        variable.set(5)
        return await worker.arun(call, owner=owner), variable.get()

    ((ident, was_inside), in_job, thread), in_task = asyncio.run(main())
    assert (was_inside, in_job, in_task) == (True, 5, 5)
    assert ident == thread


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, StopIteration, Cancelled])
def test_what_it_raises_goes_through_the_job_to_the_caller(worker: Worker, kind: type[BaseException]) -> None:
    error = kind("stop")
    unwound: list[bool] = []

    def on_step() -> None:
        raise error

    def call() -> None:
        try:
            ask(on_step)
        finally:
            unwound.append(True)

    with pytest.raises(kind) as caught:
        worker.run(call)
    assert caught.value is error
    assert unwound == [True]
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names.index("run") < names.index("_perform") < names.index("answer") < names.index("on_step")


def test_a_job_may_go_on_after_what_an_asked_function_raised(worker: Worker) -> None:
    def call() -> str:
        with pytest.raises(ZeroDivisionError):
            ask(divmod, 1, 0)
        return "went on"

    assert worker.run(call) == "went on"


def test_200_exceptions_in_asked_functions_at_random_moments(worker: Worker) -> None:
    rng, tracked = random.Random(2), Tracked()

    def on_step(step: int, last: int, kind: type[BaseException]) -> None:
        if step == last:
            raise kind(str(step))

    for i in range(TIMES):
        last, kind = rng.randrange(4), rng.choice([ValueError, KeyboardInterrupt])
        with pytest.raises(kind, match=str(last)):
            worker.run(tracked(lambda last=last, kind=kind: [ask(on_step, s, last, kind) for s in range(4)]))
        assert worker.run(lambda i=i: i) == i
    until(tracked.gone)


def test_a_job_submitted_in_an_asked_function_runs_at_once(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)  # what is queued waits for on_step to return
    order: list[str] = []
    mine, other = Thing(), Thing()

    def inner() -> str:
        order.append("inner")
        assert (inside(mine), inside(other)) == (True, False)
        return ask(lambda: worker.run(deepest, owner=mine))

    def deepest() -> str:
        assert (inside(mine), inside(other)) == (True, True)
        order.append("deepest")
        return "found"

    def on_step() -> str:
        threads.append(threading.Thread(target=worker.run, args=(lambda: order.append("queued"),)))
        threads[0].start()
        until(lambda: worker._queue)
        return worker.run(inner, owner=other)

    threads: list[threading.Thread] = []
    assert worker.run(lambda: ask(on_step), owner=mine) == "found"
    threads[0].join(30)
    assert order == ["inner", "deepest", "queued"]
    assert not inside(mine)


def test_it_runs_at_once_though_the_queue_is_full(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step() -> int:
        with monkeypatch.context() as patch:
            patch.setattr(module, "QUEUE", 0)
            return worker.run(lambda: 6)

    assert worker.run(lambda: ask(on_step)) == 6


def test_workers_of_two_devices_call_through_each_other(worker: Worker) -> None:
    other, engine = Worker(CPU), Thing()
    detach = other.attach(engine)
    first, second = Thing(), Thing()

    def on_step() -> Any:
        return other.run(lambda: ask(lambda: worker.run(lambda: (inside(first), inside(second)))), owner=second)

    assert worker.run(lambda: ask(on_step), owner=first) == (True, True)
    # and from the other's own thread
    assert worker.run(lambda: ask(lambda: other.run(lambda: worker.run(lambda: 7)))) == 7
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        worker.run(lambda: other.run(lambda: warn("far away", VortexWarning)))
    assert [entry.filename for entry in given] == [__file__]
    detach()
    until(lambda: other._serving is None)


def test_a_thread_started_and_joined_in_an_asked_function_does_not_deadlock(worker: Worker) -> None:
    mine, other = Thing(), Thing()
    served: list[str] = []

    def queue(name: str, owner: object) -> threading.Thread:
        thread = threading.Thread(target=worker.run, args=(lambda: served.append(name),), kwargs={"owner": owner})
        thread.start()
        return thread

    def on_step() -> None:
        threads.append(queue("mine", mine))
        until(lambda: worker._queue)
        queue("other", other).join(30)

    threads: list[threading.Thread] = []
    worker.run(lambda: (ask(on_step), served.append("goes on")), owner=mine)
    threads[0].join(30)
    assert served == ["other", "goes on", "mine"]


def test_a_job_of_an_owner_that_runs_deeper_down_waits(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One waits in its `on_step`, another was served meanwhile: neither's engine is entered again."""
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    mine, other = Thing(), Thing()
    order: list[str] = []
    asked = threading.Event()

    def slow_step() -> None:
        asked.set()
        with contextlib.suppress(AssertionError):
            time.sleep(0.05)
        order.append("other's step")

    def others() -> None:
        thread.start()
        assert asked.wait(30)
        worker.run(lambda: order.append("nested, of the other"), owner=other)

    thread = threading.Thread(
        target=worker.run, args=(lambda: (ask(slow_step), order.append("other")),), kwargs={"owner": other}
    )
    worker.run(lambda: ask(others), owner=mine)
    thread.join(30)
    assert order == ["other's step", "other", "nested, of the other"]


def test_a_context_that_outlives_the_question_counts_no_longer(worker: Worker) -> None:
    import contextvars

    owner = Thing()
    kept: list[contextvars.Context] = []
    worker.run(lambda: ask(lambda: kept.append(contextvars.copy_context())), owner=owner)
    assert not kept[0].run(inside, owner)
    assert kept[0].run(worker.run, lambda: 8) == 8
    ref = weakref.ref(owner)
    del owner
    assert ref() is None


def test_a_job_that_only_the_return_of_an_asked_function_would_serve_is_given_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_UP", 0.2)
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    mine, waited = Thing(), []

    def call() -> None:
        with pytest.raises(BusyError, match=r"on_step of another call has not returned for 0\.2 s.*return first"):
            worker.run(int, owner=mine)
        waited.append(1)

    def on_step() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(30)

    worker.run(lambda: (ask(on_step), ask(on_step)), owner=mine)
    assert waited == [1, 1]
    assert worker._queue == []
    waited.clear()

    async def main() -> None:
        """On the worker's thread: nobody is served, and a coroutine may be what it waits for."""
        loop = asyncio.get_running_loop()

        def blocks() -> None:
            with pytest.raises(BusyError):
                asyncio.run_coroutine_threadsafe(worker.arun(int), loop).result(30)
            waited.append(0)

        await worker.arun(lambda: ask(blocks), owner=mine)

    asyncio.run(main())
    assert waited == [0]
