"""One thread a device: order, contexts, deadlines, questions to the caller, and every way out of a call."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import linecache
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vortex_core.device import jobs
from vortex_core.device import worker as module
from vortex_core.device.jobs import Cancelled, Job, ask, check, inside, warn
from vortex_core.device.streams import Order, blas_of, streams_of
from vortex_core.device.worker import QUEUE, Worker, worker_of
from vortex_core.errors import BusyError, DeadlineError, DeviceLostError, VortexError, VortexInputError, VortexWarning

CPU = torch.device("cpu")
TIMES = 200


class Thing:
    """Something to hold, or not."""


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.0005)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, Worker]:
    """Engines of other tests may be alive, and keep their workers."""
    workers: dict[torch.device, Worker] = {}
    monkeypatch.setattr(module, "_workers", workers)
    return workers


@pytest.fixture
def worker(registry: dict[torch.device, Worker]) -> Iterator[Worker]:
    """Its thread is the only one at the end, and ends."""
    before = set(threading.enumerate())
    worker = worker_of(CPU)
    detach = worker.attach(Thing())
    del detach
    engine = Thing()
    detach = worker.attach(engine)
    assert worker.run(lambda: 1) == 1
    yield worker
    assert worker.run(lambda: 2) == 2
    assert len(set(threading.enumerate()) - before) == 1
    assert worker._stack == worker._queue == []
    detach()
    until(lambda: set(threading.enumerate()) <= before)


class Tracked:
    """Makes calls whose arguments and results must be gone when the call is over."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Any]] = []

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        argument = Thing()
        self.seen.append(weakref.ref(argument))

        def call() -> Any:
            assert argument
            result = Thing()
            self.seen.append(weakref.ref(result))
            function()
            return result

        self.seen.append(weakref.ref(call))
        return call

    def gone(self) -> bool:
        return all(ref() is None for ref in self.seen)


@contextlib.contextmanager
def occupied(worker: Worker, owner: object = None) -> Iterator[None]:
    """The worker is busy meanwhile."""
    running, gate = threading.Event(), threading.Event()

    def job() -> None:
        running.set()
        assert gate.wait(30)

    thread = threading.Thread(target=worker.run, args=(job,), kwargs={"owner": owner})
    thread.start()
    assert running.wait(30)
    try:
        yield
    finally:
        gate.set()
        thread.join(30)


def steps(n: int = 10**9, seconds: float = 0.0002) -> None:
    """A picture, as far as the worker is concerned."""
    for _ in range(n):
        check()
        time.sleep(seconds)


# The thread


def test_a_call_runs_on_the_thread_of_its_device_in_inference_mode(worker: Worker) -> None:
    def call() -> tuple[str, bool, bool]:
        thread = threading.current_thread()
        return thread.name, thread.daemon, torch.is_inference_mode_enabled()

    assert worker.run(call) == ("vortex-cpu", True, True)
    assert not torch.is_inference_mode_enabled()
    assert worker_of(torch.device("cpu", 0)) is worker


def test_cuda_without_an_index_is_the_first(registry: dict[torch.device, Worker]) -> None:
    assert worker_of(torch.device("cuda")) is worker_of(torch.device("cuda:0"))
    assert worker_of(torch.device("cuda:1")) is not worker_of(torch.device("cuda:0"))
    assert len(registry) == 2


def test_it_starts_with_the_first_job_and_ends_with_the_last_engine(registry: dict[torch.device, Worker]) -> None:
    before = set(threading.enumerate())
    worker = worker_of(CPU)
    first, second = Thing(), Thing()
    detach = worker.attach(first)
    worker.attach(second)
    assert set(threading.enumerate()) == before
    worker.run(int)
    detach()
    detach()
    assert worker.run(int) == 0
    assert worker_of(CPU) is worker
    del second  # collected
    until(lambda: set(threading.enumerate()) == before)
    assert registry == {}
    another = worker_of(CPU)
    assert another is not worker
    # who still has the old one gets an answer, and leaves no thread
    assert worker.run(lambda: 5) == 5
    until(lambda: set(threading.enumerate()) == before)


def test_an_engine_that_comes_while_the_last_goes_keeps_the_worker(registry: dict[torch.device, Worker]) -> None:
    worker = worker_of(CPU)
    first, second = Thing(), Thing()
    worker.attach(first)()
    detach = worker.attach(second)
    assert worker_of(CPU) is worker
    worker.run(int)
    assert worker._serving is not None
    other = Worker(CPU)  # as one that was made in between
    third = Thing()
    other.attach(third)()
    assert worker_of(CPU) is worker
    detach()
    until(lambda: worker._serving is None)


def test_of_two_threads_that_start_at_once_one_serves(worker: Worker) -> None:
    thread = threading.Thread(target=worker._serve)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_fork_every_call_is_refused_and_a_new_worker_works() -> None:
    """Whatever the parent did: it drew, held the lock, or forked in `on_step`, from where the child returns."""
    script = """
import asyncio, threading
from vortex_core.errors import VortexInputError
from vortex_core import jobs, worker

def told(call):
    try:
        return call()
    except VortexInputError as error:
        return "fork" if "a fork has left" in str(error) else error

def forked(call):
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    print(told(call), told(lambda: w.run(int)), told(lambda: asyncio.run(w.arun(int))), flush=True)
    other = worker.worker_of(w.device)
    other.attach(e)
    print(other.run(lambda: 3), flush=True)
    os._exit(0)

busy, gate = threading.Event(), threading.Event()
drawing = threading.Thread(target=w.run, args=(lambda: (busy.set(), gate.wait(30)),))
drawing.start()
busy.wait()
assert forked(lambda: w.run(int)) == 0
gate.set(); drawing.join()

def locked():
    with worker._lock:
        busy.set(); gate.wait(30)

busy.clear(); gate.clear()
holding = threading.Thread(target=locked)
holding.start()
busy.wait()
assert forked(lambda: w.run(int)) == 0
gate.set(); holding.join()

parent = os.getpid()
found = told(lambda: w.run(lambda: jobs.ask(os.fork)))
if os.getpid() != parent:
    print(found, flush=True)
    os._exit(0)
os.wait()
print(w.run(lambda: 4))
"""
    assert _run(script).split() == ["fork", "fork", "fork", "3"] * 2 + ["fork", "4"]


def test_the_interpreter_ends_with_a_worker_alive() -> None:
    assert _run("print(w.run(lambda: 3))") == "3\n"


def _run(script: str) -> str:
    """What a fresh interpreter prints."""
    start = "import os, torch; from vortex_core.device.worker import worker_of; w = worker_of(torch.device('cpu'))\n"
    start += "class Thing: pass\ne = Thing(); w.attach(e)\n"
    command = [sys.executable, "-W", "ignore", "-c", start + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout


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


def test_a_finalizer_may_detach_while_locks_are_held(registry: dict[torch.device, Worker]) -> None:
    worker, engine = worker_of(CPU), Thing()
    worker.attach(engine)
    worker.run(int)
    with module._lock:
        del engine
    until(lambda: worker._serving is None)


# A call


def test_what_it_raises_is_the_same_object_with_both_threads_frames(worker: Worker) -> None:
    error = ValueError("broken")

    def broken() -> None:
        raise error

    def caller() -> None:
        worker.run(broken)

    with pytest.raises(ValueError, match="broken") as caught:
        caller()
    assert caught.value is error
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names.index("caller") < names.index("_call") < names.index("broken")
    assert error.__context__ is None


def test_an_exception_keeps_its_context(worker: Worker) -> None:
    def broken() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904

    try:
        raise TypeError("what the caller handles")
    except TypeError:
        with pytest.raises(ValueError, match="second") as caught:
            worker.run(broken)
    assert isinstance(caught.value.__context__, KeyError)


def test_on_the_worker_itself_a_call_runs_inline(worker: Worker) -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)

    def inner() -> tuple[int, bool]:
        variable.set(2)
        return threading.get_ident(), torch.is_inference_mode_enabled()

    def outer() -> tuple[Any, Any, int, int]:
        with torch.inference_mode(False):
            found = worker.run(inner)
        again = asyncio.run(worker.arun(inner))
        return found, again, variable.get(), threading.get_ident()

    found, again, value, ident = worker.run(outer)
    assert found == again == (ident, True)
    assert value == 0


def test_an_inline_call_has_a_deadline_of_its_own(worker: Worker) -> None:
    def outer() -> str:
        with pytest.raises(DeadlineError, match=r"0\.002 s"):
            worker.run(steps, deadline=0.002)
        worker.run(lambda: steps(1), deadline=1000)
        steps(3)
        return "went on"

    assert worker.run(outer) == "went on"
    assert worker.run(outer, deadline=30) == "went on"


def test_a_thread_of_the_worker_without_a_job_runs_a_call_inline(worker: Worker) -> None:
    jobs.here.worker = worker  # as where a finalizer calls while it waits
    try:
        assert worker.run(threading.get_ident) == threading.get_ident()
    finally:
        jobs.here.worker = None


def test_context_variables_go_in_and_stay_there(worker: Worker) -> None:
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("caller")

    def call() -> str:
        seen = variable.get()
        variable.set("job")
        return seen

    assert worker.run(call) == "caller"
    assert variable.get() == "caller"


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


# Questions


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


# Loss


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), True),
        (RuntimeError("CUDA driver error: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (torch.OutOfMemoryError("CUDA error"), False),
        (ValueError("CUDA error"), False),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_what_tells_that_the_device_is_lost(error: Exception, lost: bool) -> None:
    assert module._tells_loss(error) is lost


def test_a_lost_worker_is_replaced_and_its_own_callers_are_told(registry: dict[torch.device, Worker]) -> None:
    before = set(threading.enumerate())
    worker, engine, told = worker_of(CPU), Thing(), []
    worker.attach(engine)

    def fail() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

    def call() -> None:
        with pytest.raises(DeviceLostError):
            worker.run(int)
        told.append(1)

    with occupied(worker):
        threads = [threading.Thread(target=call) for _ in range(3)]

        def failing() -> None:
            with pytest.raises(
                DeviceLostError, match=r"^cpu has failed: CUDA error: device-side assert triggered\. "
            ) as e:
                worker.run(fail)
            assert "DSA" in str(e.value.__cause__)
            told.append(1)

        threads.insert(0, threading.Thread(target=failing))
        for count, thread in enumerate(threads, 1):
            thread.start()
            until(lambda count=count: len(worker._queue) == count)
    for thread in threads:
        thread.join(30)
    assert len(told) == 4
    assert worker.lost
    worker.attach(engine)  # it does not come back by that
    for lost in (lambda: worker.run(int), lambda: asyncio.run(worker.arun(int))):
        with pytest.raises(DeviceLostError, match="load the model again"):
            lost()
    another = worker_of(CPU)
    assert another is not worker
    detach = another.attach(engine)
    assert another.run(lambda: 5) == 5
    detach()
    del engine
    until(lambda: set(threading.enumerate()) <= before)


# Warnings


def test_a_warning_is_at_the_line_of_the_caller(worker: Worker) -> None:
    def give() -> None:
        warn("from a job", VortexWarning)

    def plain() -> None:
        worker.run(give)  # the line

    async def awaiting() -> None:
        await worker.arun(give)  # the line

    for call in (plain, lambda: asyncio.run(awaiting())):
        with pytest.warns(VortexWarning, match="from a job") as given:
            call()
        assert [entry.filename for entry in given] == [__file__]
        assert linecache.getline(__file__, given[0].lineno).endswith("# the line\n")


def test_without_a_job_it_is_the_line_that_called_this_package() -> None:
    with pytest.warns(VortexWarning, match="plainly") as given:
        warn("plainly", VortexWarning)
    assert linecache.getline(__file__, given[0].lineno).strip() == 'warn("plainly", VortexWarning)'


def test_a_filter_that_makes_it_an_error_raises_in_the_job(worker: Worker) -> None:
    ends: list[str] = []

    def call() -> None:
        try:
            warn("an error", VortexWarning)
        except VortexWarning:
            ends.append(threading.current_thread().name)
            raise

    with pytest.raises(VortexWarning, match="an error"):
        worker.run(call)
    assert ends == ["vortex-cpu"]


def test_code_without_a_frame_outside_is_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PACKAGE", "")
    with pytest.warns(VortexWarning) as given:
        warn("all inside", VortexWarning)
    assert len(given) == 1


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
        assert worker.run(lambda i=i: i) == i
        until(tracked.gone)
        tracked.seen.clear()


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


# CUDA's streams, with stand-ins


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on streams when the caller's is another one than the worker's."""
    log: list[str] = []
    theirs, ours = FakeStream("theirs", log), FakeStream("ours", log)
    monkeypatch.setattr(worker.order, "foreign", lambda: theirs)
    monkeypatch.setattr(worker.order, "default", lambda: ours)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name} keeps {int(tensor[0])}")
    )
    return log


def test_the_streams_wait_for_each_other_around_a_job(worker: Worker, log: list[str]) -> None:
    one, two, three = (torch.tensor([i]) for i in (1, 2, 3))
    far = torch.empty(1, device="meta")
    worker.run(lambda: log.append("job") or (one, [two, (three, far)], {"no": one}, "text"))
    assert log == [
        "ours waits for theirs",
        "job",
        "theirs waits for ours",
        "theirs keeps 1",
        "theirs keeps 2",
        "theirs keeps 3",
    ]


def test_the_streams_wait_around_an_asked_function(worker: Worker, log: list[str]) -> None:
    given, returned = torch.tensor([1]), torch.tensor([2])

    def on_step(latents: torch.Tensor) -> torch.Tensor:
        log.append("asked")
        return returned

    def call() -> None:
        log.append("before")
        ask(on_step, given)
        log.append("after")

    worker.run(call)
    assert log == [
        "ours waits for theirs",
        "before",
        "theirs waits for ours",
        "theirs keeps 1",
        "asked",
        "ours waits for theirs",
        "ours keeps 2",
        "after",
        "theirs waits for ours",
    ]


def test_the_streams_wait_after_an_exception_which_stays_the_one_that_is_raised(
    worker: Worker, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: divmod(1, 0))
    assert log == ["ours waits for theirs", "theirs waits for ours"]

    def broken(*_: object) -> None:
        raise RuntimeError("no such stream")

    with monkeypatch.context() as patch:
        patch.setattr(worker.order, "lead", broken)
        with pytest.raises(ZeroDivisionError):
            worker.run(lambda: divmod(1, 0))
        with pytest.raises(RuntimeError, match="no such stream"):
            worker.run(lambda: 1)


def test_no_waits_where_the_streams_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Order(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 0)
    assert streams.foreign() is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 1)
    assert streams.foreign() == 1
    assert Order(CPU).foreign() is None


def test_the_device_is_the_threads_in_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    streams = Order(torch.device("cuda:0"))
    streams.enter()
    streams.enter()  # another thread may serve by now
    Order(CPU).enter()
    assert calls == [torch.device("cuda:0")] * 2


@pytest.mark.gpu
def test_on_a_gpu_the_streams_wait_and_cleared_workspaces_are_noticed(registry: dict[torch.device, Worker]) -> None:
    device = torch.device("cuda:0")
    worker, engine = worker_of(device), Thing()
    detach = worker.attach(engine)
    streams = streams_of(device)
    assert streams is not None
    blas = blas_of(device)
    worker.run(lambda: blas.ensure(streams))
    first = blas.generation
    assert blas.nbytes(streams) > 0
    worker.run(lambda: blas.ensure(streams))
    assert blas.generation == first
    torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
    worker.run(lambda: blas.ensure(streams))
    assert blas.generation == first + 1
    size = 1 << 26
    seen: list[float] = []
    with torch.cuda.stream(streams.side):
        for i in range(1, 50):
            x = torch.full((size,), float(i), device=device)  # the worker must wait for it
            y = worker.run(lambda x=x: (ask(lambda z: seen.append(z[-1].item()), x * 2), x + 1)[1])
            assert (y[0].item(), y[-1].item(), seen.pop()) == (i + 1, i + 1, 2 * i)
    detach()
    until(lambda: worker._serving is None)
