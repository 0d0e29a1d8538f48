"""One thread a device: when it starts and ends, what a call goes through, loss of the device, warnings."""

from __future__ import annotations

import asyncio
import linecache
import os
import subprocess
import sys
import threading
import traceback
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from worker_parts import CPU, Thing, occupied, steps, until

from vortex_core.device import jobs
from vortex_core.device import worker as module
from vortex_core.device.jobs import warn
from vortex_core.device.worker import Worker, worker_of
from vortex_core.errors import DeadlineError, DeviceLostError, VortexWarning

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
