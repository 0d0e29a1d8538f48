"""One thread a device does all of a process' work there, whoever calls.

Why: cuBLAS keeps a workspace for each thread and stream, so threads that draw would each add memory; calls are served
in the order in which they come; deadlines and cancelling have a place to live.

`Worker.run` queues a job and waits; `Worker.arun` is the same for a coroutine. What a job `ask`s runs on the thread of
its caller, which waits anyway. A job that is submitted in there runs at once, inside the one that asked.

In the main thread a KeyboardInterrupt may come between any two instructions, and a finalizer anywhere in any thread.
So there is one RLock, held for a few instructions, nobody waits while holding it, and waiting is done with `_Bell`.
Left out: priorities, and stopping a kernel that runs. A job ends early only where it asks or checks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from time import monotonic
from typing import Any, TypeVar, TypeVarTuple, Unpack

import torch
from torch import Tensor

from .errors import BusyError, DeadlineError, VortexInputError

QUEUE = 64  # jobs that may wait for a worker
PATIENCE = 0.5  # seconds that an asked function may take before others' jobs are served
WAIT = 0.1  # seconds a caller waits at a time: Windows may not interrupt a lock

_PACKAGE = os.path.join(os.path.dirname(__file__), "")

T = TypeVar("T")
Args = TypeVarTuple("Args")
Where = tuple[str, int, str, dict[Any, Any]]  # file, line, module, the module's registry of warnings

_lock = threading.RLock()


class Cancelled(BaseException):
    """Inside a job: its caller is gone. No caller sees it, and no `except Exception` catches it."""


class _Bell:
    """Rung by anyone at any moment, a finalizer too, and heard once. An Event's lock is no RLock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # rung already
            self._lock.release()

    def wait(self, timeout: float = -1) -> None:
        self._lock.acquire(timeout=timeout)


class _Outcome:
    """What a call came to. Whoever takes it takes it away, so that nothing is held."""

    result: Any = None
    error: BaseException | None = None

    def take(self) -> Any:
        """The result, or the exception raised: the same object, with the frames of both threads."""
        result, error = self.result, self.error
        self.result = self.error = None
        if error is None:
            return result
        context = error.__context__
        try:
            raise error
        finally:
            if context is not None:  # `raise` puts what the caller handles at the moment in its place
                error.__context__ = context
            del error, context  # the exception knows this frame


class _Job(_Outcome):
    """A call on its way. `where`, for a warning, is known of a caller who cannot be asked, a coroutine."""

    notify: Callable[[], None]
    where: Where | None = None

    def __init__(self, worker: Worker, call: Callable[[], Any], owner: object, deadline: float | None) -> None:
        valid = isinstance(deadline, int | float) and 0 < deadline <= sys.float_info.max
        if deadline is not None and (not valid or isinstance(deadline, bool)):
            raise VortexInputError(
                f"deadline is a number of seconds above 0, such as 30, and finite, not {deadline!r}."
            )
        self.deadline = deadline
        self.limit = None if deadline is None else monotonic() + deadline
        self.worker, self.owner = worker, owner
        self.call: Any = call
        self.context: Any = copy_context()
        self.stream = worker._order.foreign()
        # the asked function in which this was submitted: who asked there waits for it
        self.origin = next((q for q in reversed(_asked.get()) if q.open and q.worker is worker), None)
        self.question: _Question | None = None
        self.running = self.done = self.gone = False

    def check(self) -> None:
        if self.gone:
            raise Cancelled
        if self.limit is not None and monotonic() > self.limit:
            raise DeadlineError(
                f"The call took longer than its deadline of {self.deadline:g} s, and was stopped. Give it more time.",
                deadline=self.deadline,
            )

    def pause(self) -> float | None:
        """Seconds until its time in the queue is up; None: it runs, or has all the time."""
        return None if self.running or self.limit is None else max(0.0, self.limit - monotonic())

    def finish(self) -> None:
        self.call = self.context = self.owner = self.origin = self.where = self.stream = None
        if self.gone:
            self.result = self.error = None
        self.done = True


class _Question(_Outcome):
    """A function that a job wants to have run on the thread of its caller. Open until the job goes on."""

    def __init__(self, job: _Job, call: Callable[[], Any]) -> None:
        self.worker, self.owner = job.worker, job.owner
        self.call: Any = call
        self.open, self.answered = True, False

    def answer(self) -> None:
        token = _asked.set((*_asked.get(), self))
        try:
            with torch.inference_mode():
                self.result = self.call()
        except BaseException as error:
            self.error = error
        finally:
            _asked.reset(token)
        self.answered = True
        self.worker._bell.ring()

    def close(self) -> None:
        self.open = False
        self.call = self.owner = self.result = self.error = None


class _Here(threading.local):
    worker: Worker | None = None  # whose thread this is
    job: _Job | None = None  # that runs on it


_here = _Here()
_asked: ContextVar[tuple[_Question, ...]] = ContextVar("vortex_asked", default=())  # those that we are inside of


class _Order:
    """How a caller's stream and the worker's, the default one, wait for each other; on the CPU none is foreign."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter(self) -> None:
        """Make the device this thread's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def default(self) -> torch.cuda.Stream:
        return torch.cuda.default_stream(self.device)

    def on_default(self) -> AbstractContextManager[Any]:
        """Inside, the default stream is this thread's, as it is outside of functions that are asked for."""
        return torch.cuda.stream(self.default()) if self.device.type == "cuda" else nullcontext()

    def foreign(self) -> torch.cuda.Stream | None:
        """The caller's stream where it is not the one that the worker uses."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self.device)
        return None if stream == self.default() else stream

    def follow(self, caller: torch.cuda.Stream | None, value: object = None) -> None:
        """Let the worker's work wait for what the caller has launched, and use `value`."""
        if caller is not None:
            self._wait(self.default(), caller, value)

    def lead(self, caller: torch.cuda.Stream | None, value: object = None) -> None:
        """Let the caller's work wait for what the worker has launched, and use `value`."""
        if caller is not None:
            self._wait(caller, self.default(), value)

    def _wait(self, waiter: torch.cuda.Stream, other: torch.cuda.Stream, value: object) -> None:
        waiter.wait_stream(other)
        for tensor in _tensors(value):
            if tensor.device == self.device:
                tensor.record_stream(waiter)


def _let_go(error: BaseException) -> None:
    """Have the frames of this package that raised forget their locals: whoever keeps the error would keep memory."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            with suppress(RuntimeError):  # it still runs
                trace.tb_frame.clear()
        trace = trace.tb_next


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


class Worker:
    """The thread of one device. Get it from `worker_of`. It starts with a job and ends with the last engine."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._order = _Order(device)
        self._bell = _Bell()
        self._queue: list[_Job] = []
        self._stack: list[_Job] = []  # that run, each inside the one before
        self._engines: set[object] = set()
        self._ended = False
        # the process in which the thread lives: a fork leaves it behind. Not Thread.is_alive: an interrupt in there
        # makes Python 3.11 take a living thread for a dead one
        self._serving: int | None = None

    def attach(self, engine: object) -> Callable[[], None]:
        """Keep the worker alive until the callable returned is called, or the engine collected."""
        token = object()
        detach = weakref.finalize(engine, self._detach, token)
        with _lock:
            self._engines.add(token)
            self._ended = False
            _workers.setdefault(self.device, self)
        return detach

    def _detach(self, token: object) -> None:
        with _lock:
            self._engines.discard(token)
            if not self._engines:
                self._ended = True
                if _workers.get(self.device) is self:
                    del _workers[self.device]
        self._bell.ring()

    def run(self, call: Callable[[], T], *, owner: object = None, deadline: float | None = None) -> T:
        """Run `call` on the thread, and wait; right here if this is the thread.

        It runs in a copy of the caller's context, in inference mode, after those that were submitted before.
        `deadline` is in seconds from now. Raises what `call` raises, `VortexInputError`, `BusyError` and
        `DeadlineError`. A KeyboardInterrupt goes on when the worker has let go of the job; a second one at once.
        """
        job = _Job(self, call, owner, deadline)
        bell = _Bell()
        job.notify = bell.ring
        if _here.worker is self:
            return self._inline(job)
        try:
            self._submit(job)
            while not job.done:
                question, job.question = job.question, None
                if question is not None:
                    question.answer()
                else:
                    self._expire(job)
                    pause = job.pause()
                    bell.wait(WAIT if pause is None else min(WAIT, pause))
            return job.take()
        except BaseException:
            self._cancel(job)
            while not job.done:
                bell.wait(WAIT)
            job.result = job.error = None
            raise
        finally:
            if not job.done:  # a second interrupt, maybe before the first was heeded: nobody will answer
                self._cancel(job)

    async def arun(self, call: Callable[[], T], *, owner: object = None, deadline: float | None = None) -> T:
        """`run` for a coroutine. When its task is cancelled, it ends as soon as the worker has let go of the job."""
        job = _Job(self, call, owner, deadline)
        loop = asyncio.get_running_loop()
        finished = loop.create_future()
        job.notify, job.where = partial(_notify, loop, finished), _outside()
        if _here.worker is self:
            return self._inline(job)
        cancelled = None
        try:
            self._submit(job)
            while not job.done:
                try:
                    await asyncio.wait([finished], timeout=job.pause())
                except asyncio.CancelledError as error:
                    cancelled = error
                    self._cancel(job)
                self._expire(job)
            if cancelled is not None:
                raise cancelled
            return job.take()
        finally:
            if not job.done:
                self._cancel(job)
            job.result = job.error = cancelled = None

    def _submit(self, job: _Job) -> None:
        with _lock:
            waiting = len(self._queue)
            if waiting >= QUEUE and job.origin is None:
                raise BusyError(
                    f"{waiting} calls wait for {self.device} already. Wait until some are done, or call from fewer "
                    "threads.",
                    waiting=waiting,
                )
            self._queue.append(job)
            asleep = self._serving != os.getpid()
        if asleep:  # not under the lock: `start` waits. Of two that are started one serves
            threading.Thread(target=self._serve, name=f"vortex-{self.device}", daemon=True).start()
        self._bell.ring()

    def _cancel(self, job: _Job) -> bool:
        """Take a job out of the queue, or have it end at its next step. Whether it never ran."""
        with _lock:
            job.gone = True
            if waits := not (job.running or job.done):
                if job in self._queue:
                    self._queue.remove(job)
                job.finish()
        self._bell.ring()
        return waits

    def _expire(self, job: _Job) -> None:
        if job.pause() == 0:
            with _lock:
                waiting, late = len(self._queue), not job.running and self._cancel(job)
            if late:
                raise DeadlineError(
                    f"The call's turn on {self.device} did not come within its deadline of {job.deadline:g} s; "
                    f"{waiting} waited. Give it more time, or call from fewer threads.",
                    deadline=job.deadline,
                )

    def _serve(self) -> None:
        with _lock:
            if self._serving == os.getpid():
                return
            self._serving, _here.worker = os.getpid(), self
        while True:
            with _lock:
                job = self._next()
                if job is None and self._ended:
                    self._serving = None
                    return
            if job is None:
                self._bell.wait()
            else:
                self._perform(job)
            del job

    def _next(self, question: _Question | None = None, patient: bool = False) -> _Job | None:
        """The next job of the queue; while a question is open, the next that may run in the middle of the asker."""
        with _lock:
            for job in self._queue:
                if question is not None and job.origin is not question:
                    if patient and (job.origin is None or not job.origin.open):
                        continue
                    if job.owner is not None and any(job.owner is running.owner for running in self._stack):
                        continue
                self._queue.remove(job)
                job.running = True
                return job
            return None

    def _perform(self, job: _Job) -> None:
        outer, _here.job = _here.job, job
        self._stack.append(job)
        try:
            job.result = job.context.run(self._call, job)
        except BaseException as error:
            _let_go(error)
            job.error = error
        self._stack.pop()
        _here.job = outer
        with _lock:
            job.finish()
        job.notify()

    def _call(self, job: _Job) -> Any:
        with torch.inference_mode():
            job.check()
            self._order.enter()
            self._order.follow(job.stream)
            try:
                result = job.call()
            except BaseException:
                with suppress(RuntimeError):  # where CUDA is broken, the first error says it
                    self._order.lead(job.stream)
                raise
            self._order.lead(job.stream, result)
            return result

    def _inline(self, job: _Job) -> Any:
        """Run a call as a part of the job that runs already, which has the caller; the nearer deadline counts."""
        outer = _here.job or job
        before = outer.limit, outer.deadline
        if job.limit is not None and (outer.limit is None or job.limit < outer.limit):
            outer.limit, outer.deadline = job.limit, job.deadline
        try:
            with torch.inference_mode(), self._order.on_default():
                self._order.follow(job.stream)
                result = job.context.run(job.call)
                self._order.lead(job.stream, result)
                return result
        finally:
            outer.limit, outer.deadline = before

    def _ask(self, job: _Job, call: partial[Any]) -> Any:
        question = _Question(job, call)
        try:
            if job.where is not None:
                copy_context().run(question.answer)
                return question.take()
            self._order.lead(job.stream, call.args)
            impatient = monotonic() + PATIENCE
            job.question = question
            job.notify()
            while not question.answered:
                if job.gone:
                    raise Cancelled
                left = impatient - monotonic()
                other = self._next(question, patient=left > 0)
                if other is None:
                    self._bell.wait(left if left > 0 else -1)
                else:
                    self._perform(other)
                del other
            self._order.follow(job.stream, question.result)
            return question.take()
        finally:
            job.question = None
            question.close()


_workers: dict[torch.device, Worker] = {}


def worker_of(device: torch.device) -> Worker:
    """The worker of a device, made where none is alive."""
    device = torch.device("cpu") if device.type == "cpu" else torch.device(device.type, device.index or 0)
    with _lock:
        return _workers.setdefault(device, _workers.get(device) or Worker(device))


def check() -> None:
    """For code that draws, at every step: end here if the job's deadline is over or its caller gone."""
    if (job := _here.job) is not None:
        job.check()


def ask(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """`function(*args)` on the thread and in the context of the job's caller; right here where no job runs.

    A coroutine's thread does not wait, so for `arun` it runs here, in a copy of the context. What it raises is raised
    here. While it runs, jobs that it submits are served, and after `PATIENCE` seconds those of other owners.
    """
    job = _here.job
    return function(*args) if job is None else job.worker._ask(job, partial(function, *args))


def inside(owner: object) -> bool:
    """Whether we are inside a function that a job of `owner` asked for."""
    return any(question.open and question.owner is owner for question in _asked.get())


def warn(message: str, category: type[Warning]) -> None:
    """Give a warning at the line, outside this package, that made the call. It raises where a filter says so."""
    job = _here.job
    if job is None:
        warnings.warn_explicit(message, category, *_outside())
    elif job.where is not None:
        warnings.warn_explicit(message, category, *job.where)
    else:
        ask(warn, message, category)


def _outside() -> Where:
    """The innermost line outside this package. By folder: as a part of another package it has another name."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        frame = frame.f_back
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    return frame.f_code.co_filename, frame.f_lineno, names.get("__name__", "<unknown>"), registry


def _notify(loop: asyncio.AbstractEventLoop, finished: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(finished.cancel)
