"""Every way out of a call that runs or waits: interrupts in threads, cancelled and dropped coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from worker_parts import TIMES, Thing, Tracked, occupied, steps, until

from vortex_core.device import jobs
from vortex_core.device.jobs import Cancelled, Job, ask, check
from vortex_core.device.worker import Worker

# Interrupts


class Alarm:
    """KeyboardInterrupts in the main thread, by a timer's signals: as many as are left."""

    left = 0
    interval = 0.0

    def __call__(self, seconds: float, interval: float = 0, times: int = 1) -> None:
        self.left, self.interval = times, interval
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> None:
        self.left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)

    def ring(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            if self.left:  # a timer that repeats leaves no time for anything else
                signal.setitimer(signal.ITIMER_REAL, self.interval)
            raise KeyboardInterrupt


@pytest.fixture
def untraced() -> Iterator[None]:
    """Nothing measures coverage on this thread: it holds a lock, and an interrupt in there leaves it locked."""
    trace = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(trace)


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    if not hasattr(signal, "setitimer"):
        pytest.skip("no interval timers on this system")
    alarm = Alarm()
    before = signal.signal(signal.SIGALRM, alarm.ring)
    gc.disable()  # Python swallows an exception in a callback of the collection, of which hypothesis has one
    yield alarm
    gc.enable()
    alarm.stop()
    signal.signal(signal.SIGALRM, before)


def test_an_interrupt_cancels_the_job_and_goes_on(worker: Worker, alarm: Alarm) -> None:
    ends: list[str] = []
    tracked = Tracked()

    def call() -> None:
        try:
            steps()
        except Cancelled:
            time.sleep(0.01)  # the caller waits until the worker has let go
            ends.append("cancelled")
            raise

    alarm(0.01)
    with pytest.raises(KeyboardInterrupt):
        worker.run(tracked(call))
    assert ends == ["cancelled"]
    assert tracked.gone()


def test_what_a_job_returns_after_an_interrupt_is_dropped(worker: Worker, alarm: Alarm) -> None:
    tracked = Tracked()
    alarm(0.01)
    with pytest.raises(KeyboardInterrupt):
        worker.run(tracked(lambda: time.sleep(0.03)))
    until(tracked.gone)


def test_an_interrupt_takes_a_job_out_of_the_queue(worker: Worker, alarm: Alarm) -> None:
    tracked = Tracked()
    with occupied(worker):
        alarm(0.01)
        with pytest.raises(KeyboardInterrupt):
            worker.run(tracked(int))
        assert worker._queue == []
    assert tracked.gone()


def test_a_second_interrupt_leaves_at_once(worker: Worker, alarm: Alarm) -> None:
    tracked, gate = Tracked(), threading.Event()
    alarm(0.01, 0.02, times=2)
    with pytest.raises(KeyboardInterrupt):
        worker.run(tracked(lambda: gate.wait(30)))
    assert worker._stack
    gate.set()
    until(tracked.gone)


def test_questions_are_answered_with_the_cancellation(worker: Worker) -> None:
    ends: list[str] = []

    def call() -> None:
        job = jobs.here.job
        assert job is not None
        job.gone = True  # as by an interrupt between two instructions
        try:
            ask(int)
        except Cancelled:
            ends.append("cancelled")
            raise

    job = Job(worker, call, None, None)
    job.notify = int  # type: ignore[assignment]
    worker._submit(job)
    until(lambda: job.done)
    assert ends == ["cancelled"]
    assert job.take() is None


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.usefixtures("untraced")
def test_200_interrupts_at_random_moments(worker: Worker, alarm: Alarm, asks: bool) -> None:
    rng, tracked = random.Random(3), Tracked()

    def drawing() -> None:
        for step in range(8):
            check()
            if asks:
                assert ask(lambda step=step: step) == step

    for i in range(TIMES):
        end = time.monotonic() + 30
        with contextlib.suppress(KeyboardInterrupt):
            alarm(rng.uniform(1e-4, 2e-3))
            while time.monotonic() < end:
                worker.run(tracked(drawing))
        assert time.monotonic() < end
        assert not torch.is_inference_mode_enabled()
        assert jobs.asked.get() == ()
        assert worker.run(lambda i=i: i) == i
        until(tracked.gone)
        tracked.seen.clear()


@pytest.mark.usefixtures("untraced")
def test_200_interrupts_that_come_twice(worker: Worker, alarm: Alarm) -> None:
    """The second at any moment of the first's way out, or after it."""
    rng, tracked = random.Random(4), Tracked()
    for i in range(TIMES):
        try:
            try:
                alarm(rng.uniform(1e-4, 1e-3), rng.uniform(5e-6, 3e-4), times=2)
                worker.run(tracked(lambda: [ask(int) for _ in iter(check, 1)]))
            except KeyboardInterrupt:
                until(lambda: not alarm.left)
        except KeyboardInterrupt:
            pass
        assert alarm.left == 0
        alarm.stop()
        assert not torch.is_inference_mode_enabled()
        assert jobs.asked.get() == ()
        assert worker.run(lambda i=i: i) == i
        until(tracked.gone)
        tracked.seen.clear()


@pytest.mark.parametrize("already", [False, True], ids=["first", "second"])
@pytest.mark.usefixtures("untraced")
def test_an_interrupt_anywhere_in_an_answer_leaves_its_thread_as_it_was(worker: Worker, already: bool) -> None:
    """CPython raises one where a function starts, and after one in C has returned. A profiler may raise there, too."""

    def call() -> None:
        if already:
            raise KeyboardInterrupt

    left = 0

    def interrupt(frame: object, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

    for moment in itertools.count():
        left = moment
        question = jobs.Question(Job(worker, int, None, None), call)
        try:
            sys.setprofile(interrupt)
            question.answer()
        except KeyboardInterrupt as error:
            kept = error  # and with it all frames
        finally:
            sys.setprofile(None)
        assert not torch.is_inference_mode_enabled()
        assert jobs.asked.get() == ()
        if left >= 0:
            break
    assert moment > 5
    del kept


# Coroutines


def test_a_coroutine_gets_result_and_exception_and_starts_no_thread(worker: Worker) -> None:
    before = threading.active_count()

    async def main() -> Any:
        with pytest.raises(ZeroDivisionError):
            await worker.arun(lambda: divmod(1, 0))
        found = await asyncio.gather(*(worker.arun(lambda i=i: i) for i in range(20)))
        assert threading.active_count() == before
        return found

    assert asyncio.run(main()) == list(range(20))


def test_a_cancelled_coroutine_ends_when_the_worker_has_let_go(worker: Worker) -> None:
    ends: list[str] = []
    tracked = Tracked()
    running = threading.Event()

    def call() -> None:
        running.set()
        try:
            steps()
        except Cancelled:
            time.sleep(0.01)
            ends.append("cancelled")
            raise

    async def main() -> None:
        task = asyncio.create_task(worker.arun(tracked(call)))
        while not running.is_set():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.001)
        task.cancel()  # once more changes nothing
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ends == ["cancelled"]

    asyncio.run(main())
    gc.collect()  # asyncio's own cycles
    until(tracked.gone)


def test_a_coroutine_cancelled_in_the_queue_ends_at_once(worker: Worker) -> None:
    async def main() -> None:
        with occupied(worker):
            task = asyncio.create_task(worker.arun(int, deadline=30))
            while not worker._queue:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert worker._queue == []

    asyncio.run(main())


def test_200_cancelled_coroutines_at_random_moments(worker: Worker) -> None:
    rng, tracked = random.Random(5), Tracked()

    async def main() -> int:
        cancelled = 0
        for i in range(TIMES):
            n = rng.randrange(1, 4)
            tasks = [
                asyncio.create_task(worker.arun(tracked(lambda: [ask(check) or steps(1) for _ in range(4)])))
                for _ in range(n)
            ]
            await asyncio.sleep(rng.uniform(0, 0.003))
            rng.choice(tasks).cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            cancelled += sum(isinstance(result, asyncio.CancelledError) for result in found)
            assert all(isinstance(result, Thing | asyncio.CancelledError) for result in found)
            del tasks, found
            assert await worker.arun(lambda i=i: i) == i
        return cancelled

    assert asyncio.run(main()) > TIMES / 4
    gc.collect()
    until(tracked.gone)


def test_a_closed_loop_does_not_break_the_worker(worker: Worker) -> None:
    tracked = Tracked()
    gate = threading.Event()
    loop = asyncio.new_event_loop()
    coroutine = worker.arun(tracked(lambda: gate.wait(30)))
    task = loop.create_task(coroutine)
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    loop.close()
    gate.set()
    assert worker.run(lambda: 9) == 9
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    with contextlib.suppress(RuntimeError):
        coroutine.close()
    del task, coroutine, loop
    gc.collect()
    until(tracked.gone)


def test_a_coroutine_that_is_thrown_away_cancels_its_job(worker: Worker) -> None:
    running, ended = threading.Event(), threading.Event()

    def call() -> None:
        running.set()
        try:
            steps()
        except Cancelled:
            ended.set()
            raise

    async def main() -> None:
        coroutine = worker.arun(call)
        coroutine.send(None)
        assert running.wait(30)
        coroutine.close()
        assert ended.wait(30)

    asyncio.run(main())
