"""Calls that wait for a device's thread: their order, how many may wait, and deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worker_parts import CPU, TIMES, Thing, Tracked, occupied, steps, until

from vortex_core.device.jobs import Job, check
from vortex_core.device.worker import QUEUE, Worker, worker_of
from vortex_core.errors import BusyError, DeadlineError, VortexError, VortexInputError


def test_jobs_that_wait_are_served_though_the_last_engine_goes(registry: dict[torch.device, Worker]) -> None:
    worker, engine = worker_of(CPU), Thing()
    detach = worker.attach(engine)
    found: list[int] = []
    with occupied(worker):
        thread = threading.Thread(target=lambda: found.append(worker.run(lambda: 3)))
        thread.start()
        until(lambda: worker._queue)
        detach()
    thread.join(30)
    assert found == [3]
    until(lambda: worker._serving is None)


def test_callers_from_16_threads_are_served_in_the_order_in_which_they_came(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[Any] = []
    served: list[Any] = []
    lock, submit = threading.Lock(), worker._submit

    def noted(job: Any) -> None:
        with lock:
            came.append(job.owner)
            submit(job)

    monkeypatch.setattr(worker, "_submit", noted)

    def caller(name: int) -> None:
        for turn in range(40):
            mark = (name, turn)
            assert worker.run(lambda mark=mark: served.append(mark) or mark, owner=mark) == mark

    threads = [threading.Thread(target=caller, args=(name,)) for name in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(served) == 16 * 40
    assert served == came


def test_beyond_the_queue_a_call_is_refused_at_once(worker: Worker) -> None:
    served: list[int] = []
    with occupied(worker):
        threads = []
        for i in range(QUEUE):
            threads.append(threading.Thread(target=worker.run, args=(lambda i=i: served.append(i),)))
            threads[-1].start()
            until(lambda i=i: len(worker._queue) == i + 1)
        with pytest.raises(BusyError, match=r"64 calls wait for cpu already\. Wait until") as caught:
            worker.run(int)
        assert caught.value.waiting == 64
        assert isinstance(caught.value, VortexError)
        with pytest.raises(BusyError):
            asyncio.run(worker.arun(int))
    for thread in threads:
        thread.join(30)
    assert served == list(range(QUEUE))


# Deadlines


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), float("inf"), 10**400, True, "1"])
def test_a_deadline_is_a_finite_number_above_0(worker: Worker, deadline: Any) -> None:
    with pytest.raises(VortexInputError, match="deadline is a number of seconds above 0"):
        worker.run(int, deadline=deadline)


@given(st.floats(min_value=1, max_value=sys.float_info.max) | st.integers(1, 10**300))
def test_any_other_is_taken(deadline: float) -> None:
    assert Job(Worker(CPU), int, None, deadline).pause() > 0  # type: ignore[operator]


def test_a_call_whose_time_is_up_in_the_queue_is_taken_out(worker: Worker) -> None:
    tracked = Tracked()
    with occupied(worker):
        with pytest.raises(DeadlineError, match=r"turn on cpu did not come within its deadline of 0\.01 s; 1 waited"):
            worker.run(tracked(int), deadline=0.01)
        with pytest.raises(TimeoutError) as caught:
            asyncio.run(worker.arun(tracked(int), deadline=0.01))
        assert caught.value.deadline == 0.01  # type: ignore[attr-defined]
        assert worker._queue == []
    del caught
    gc.collect()  # asyncio's own cycles
    until(tracked.gone)


def test_a_call_that_runs_ends_at_its_next_check(worker: Worker) -> None:
    with pytest.raises(DeadlineError, match=r"took longer than its deadline of 0\.1 s, and was stopped"):
        worker.run(steps, deadline=0.1)
    with pytest.raises(DeadlineError, match=r"took longer than its deadline of 0\.1 s"):
        asyncio.run(worker.arun(steps, deadline=0.1))
    assert worker.run(lambda: time.sleep(0.11), deadline=0.1) is None  # it never checks
    assert worker.run(lambda: steps(3), deadline=30) is None


def test_check_does_nothing_where_no_job_runs() -> None:
    check()


def test_200_deadlines_at_random_moments(worker: Worker) -> None:
    rng, tracked, late = random.Random(1), Tracked(), 0
    for i in range(TIMES):
        with contextlib.suppress(DeadlineError):
            late += 1
            worker.run(tracked(lambda: steps(3)), deadline=rng.uniform(1e-6, 2e-3))
            late -= 1
        assert worker.run(lambda i=i: i) == i
    assert late > 0
    until(tracked.gone)
