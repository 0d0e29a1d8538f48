"""One thread for each device does all of a process' work there, whichever thread calls.

Why: cuBLAS keeps a workspace for each thread and stream, so every thread that draws would add memory; calls are served
in the order in which they come; deadlines and cancelling have their place here.

`Worker.run` queues a job and waits; `Worker.arun` does so for a coroutine. A function that a job `ask`s for runs on the
thread of its caller, which waits anyway. A job that this function submits runs at once, inside the job that asked.

In the main thread a KeyboardInterrupt may come between any two instructions; a finalizer may run anywhere in any
thread. So there is one RLock, held for a few instructions and never while waiting; threads wait with a `Bell`.
Left out: priorities, and stopping a kernel that runs. A job ends early only where it asks or checks.

A worker can be lost: its device has failed, or it belongs to the process that this one was forked from. Then every call
raises. After a device has failed, the next engine gets a new worker, which works if the device does.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import torch

from ..errors import SHOWN, BusyError, DeadlineError, DeviceLostError, VortexInputError
from ..utils.inference_mode import inference_mode
from .jobs import PACKAGE, Bell, Cancelled, Job, Question, here, outside
from .streams import Order

QUEUE = 64  # jobs that may wait for a worker
PATIENCE = 0.5  # seconds that a function a job asked for may take before jobs of other owners run
HELD_UP = 10.0  # seconds that it may take while a call waits that can only run after it
WAIT = 0.1  # seconds that a caller waits at a time: on Windows a lock may not be interrupted
LOST = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]|CU(BLAS|DNN)_STATUS_(EXECUTION|INTERNAL)")
# a library that refuses a call, or has no memory for it, leaves the device as it was
NOT_LOST = re.compile(r"out of memory|_STATUS_(?!EXECUTION|INTERNAL|MAPPING)", re.IGNORECASE)

T = TypeVar("T")

_lock = threading.RLock()


def _let_go(error: BaseException) -> None:
    """Clear the locals of this package's frames in the traceback: who keeps the error would keep their memory."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
            with suppress(RuntimeError):  # the frame still runs
                trace.tb_frame.clear()
        trace = trace.tb_next


class Worker:
    """The thread of one device; see `worker_of`. It starts with the first job and ends with the last engine."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.order = Order(device)
        self.bell = Bell()
        self._queue: list[Job] = []
        self._stack: list[Job] = []  # jobs that run, each inside the one before
        self._engines: set[object] = set()
        self._ended = False
        # the process in which the thread runs: a fork has no copy of it. Not Thread.is_alive, which in Python 3.11 is
        # False for a living thread after an interrupt inside it
        self._serving: int | None = None
        self._process = os.getpid()
        self._lost: str | None = None  # why the device is lost

    def check(self) -> None:
        """Raise `DeviceLostError` where the device has failed, and `VortexInputError` in a forked process."""
        if self._lost is not None:
            raise DeviceLostError(self._lost)
        if self._process != os.getpid():
            raise VortexInputError(
                f"This engine is of process {self._process}, and a fork has left its thread behind. Load the model in "
                "this process, on the CPU, as CUDA does not work in a fork; or start processes by spawn."
            )

    @property
    def lost(self) -> bool:
        """Whether no job can run here any more."""
        return self._lost is not None or self._process != os.getpid()

    def attach(self, engine: object) -> Callable[[], None]:
        """Keep the worker alive until the returned function is called, or `engine` is collected."""
        token = object()
        detach = weakref.finalize(engine, self._detach, token)
        with _lock:
            self._engines.add(token)
            self._ended = False
            if not self.lost:
                _workers.setdefault(self.device, self)
        return detach

    def _detach(self, token: object) -> None:
        with _lock:
            self._engines.discard(token)
            if not self._engines:
                self._ended = True
                if _workers.get(self.device) is self:
                    del _workers[self.device]
        self.bell.ring()

    def run(self, call: Callable[[], T], *, owner: object = None, deadline: float | None = None) -> T:
        """Run `call` on the worker's thread, and wait for it. On that thread, run it right here.

        It runs in a copy of the caller's context, in inference mode, after the calls that were submitted before.
        `deadline` is in seconds from now. Raises what `call` raises, `VortexInputError`, `BusyError`, `DeadlineError`
        and `DeviceLostError`. A KeyboardInterrupt is raised once the worker has left the job; a second one at once.
        """
        self.check()
        job = Job(self, call, owner, deadline)
        bell = Bell()
        job.notify = bell.ring
        if here.worker is self:
            return self._inline(job)
        try:
            self._submit(job)
            while not job.done:
                question, job.question = job.question, None
                if question is not None:
                    question.answer()
                else:
                    self._watch(job)
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
            if not job.done:  # a second interrupt, maybe before the first took effect: no caller is left
                self._cancel(job)

    async def arun(self, call: Callable[[], T], *, owner: object = None, deadline: float | None = None) -> T:
        """`run` for a coroutine. If its task is cancelled, it ends once the worker has left the job."""
        self.check()
        job = Job(self, call, owner, deadline)
        loop = asyncio.get_running_loop()
        finished = loop.create_future()
        job.notify, job.where = partial(_notify, loop, finished), outside()
        if here.worker is self:
            return self._inline(job)
        cancelled = None
        try:
            self._submit(job)
            while not job.done:
                try:
                    patience = None if job.running else 10 * WAIT
                    await asyncio.wait([finished], timeout=_nearer(patience, job.pause()))
                except asyncio.CancelledError as error:
                    cancelled = error
                    self._cancel(job)
                self._watch(job)
            if cancelled is not None:
                raise cancelled
            return job.take()
        finally:
            if not job.done:
                self._cancel(job)
            job.result = job.error = cancelled = None

    def _submit(self, job: Job) -> None:
        with _lock:
            self.check()  # under the lock, so that it cannot be lost meanwhile
            waiting = len(self._queue)
            if waiting >= QUEUE and job.origin is None:
                raise BusyError(
                    f"{waiting} calls wait for {self.device} already. Wait until some are done, or call from fewer "
                    "threads.",
                    waiting=waiting,
                )
            self._queue.append(job)
            asleep = self._serving != os.getpid()
        if asleep:  # not under the lock: `start` waits. If two threads start, one ends at once
            threading.Thread(target=self._serve, name=f"vortex-{self.device}", daemon=True).start()
        self.bell.ring()

    def _cancel(self, job: Job) -> bool:
        """Take a job out of the queue, or have it end at its next step. Returns whether it never ran."""
        with _lock:
            job.gone = True
            if waits := not (job.running or job.done) or self._process != os.getpid():
                if job in self._queue:
                    self._queue.remove(job)
                job.finish()
        self.bell.ring()
        return waits

    def _watch(self, job: Job) -> None:
        """Raise what ends the wait for a turn: the deadline, or another call's `on_step` that does not return."""
        if self._process != os.getpid():  # in the child of a fork, where no worker runs
            self.check()
        if job.pause() == 0:
            with _lock:
                waiting, late = len(self._queue), not job.running and self._cancel(job)
            if late:
                raise DeadlineError(
                    f"The call's turn on {self.device} did not come within its deadline of {job.deadline:g} s; "
                    f"{waiting} waited. Give it more time, or call from fewer threads.",
                    deadline=job.deadline,
                )
        with _lock:
            waiting, first = len(self._queue), next((other for other in self._stack if _holds_up(other, job)), None)
            if first is None or job.running or not self._cancel(job):
                return
            first.held_up = True
        raise BusyError(
            f"on_step of another call has not returned for {HELD_UP:g} s, and this call waited for it. If on_step "
            "waits for this call, as for a thread that it joins, neither would end: have on_step return first.",
            waiting=waiting,
        )

    def _serve(self) -> None:
        with _lock:
            if self._serving == os.getpid():
                return
            self._serving, here.worker = os.getpid(), self
        while True:
            with _lock:
                job = self._next()
                if job is None and self._ended:
                    self._serving = None
                    return
            if job is None:
                self.bell.wait()
            else:
                self._perform(job)
            del job

    def _next(self, question: Question | None = None, patient: bool = False) -> Job | None:
        """The next job of the queue; with an open `question`, the next that may run inside the job that asked it."""
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

    def _perform(self, job: Job) -> None:
        outer, here.job = here.job, job
        self._stack.append(job)
        try:
            job.result = job.context.run(self._call, job)
        except BaseException as error:
            _let_go(error)
            job.error = self._lose(error) if _tells_loss(error) else error
        self._stack.pop()
        here.job = outer
        with _lock:
            job.finish()
        job.notify()

    def _lose(self, cause: BaseException) -> DeviceLostError:
        """Mark the device as lost, end all jobs that wait with an error, and return the error for this one."""
        reason = str(cause).partition("\n")[0][:SHOWN]
        with _lock:
            self._lost = (
                f"{self.device} has failed: {reason}. Engines there cannot draw any more: unload them, and load the "
                "model again. Where that ends the same way, CUDA is lost to this process: start a new one."
            )
            if _workers.get(self.device) is self:
                del _workers[self.device]
            waiting, self._queue = self._queue, []
            for job in waiting:
                job.error = DeviceLostError(self._lost)
                job.finish()
        for job in waiting:
            job.notify()
        error = DeviceLostError(self._lost)
        error.__cause__ = cause
        return error

    def _call(self, job: Job) -> Any:
        with inference_mode():
            job.check()
            self.order.enter()
            self.order.follow(job.stream)
            try:
                result = job.call()
            except BaseException:
                with suppress(RuntimeError):  # CUDA is broken: the first error tells why
                    self.order.lead(job.stream)
                raise
            self.order.lead(job.stream, result)
            return result

    def _inline(self, job: Job) -> Any:
        """Run a call as a part of the job that already runs on this thread. The earlier deadline counts."""
        outer = here.job or job
        before = outer.limit, outer.deadline
        if job.limit is not None and (outer.limit is None or job.limit < outer.limit):
            outer.limit, outer.deadline = job.limit, job.deadline
        try:
            with inference_mode(), self.order.on_default():
                self.order.follow(job.stream)
                result = job.context.run(job.call)
                self.order.lead(job.stream, result)
                return result
        finally:
            outer.limit, outer.deadline = before

    def ask(self, job: Job, call: partial[Any]) -> Any:
        """See `jobs.ask`."""
        question = job.asking = Question(job, call)
        try:
            if job.where is not None:
                copy_context().run(question.answer)
                return question.take()
            self.order.lead(job.stream, call.args)
            impatient = monotonic() + PATIENCE
            job.question = question
            job.notify()
            while not question.answered:
                if job.gone:
                    raise Cancelled
                left = impatient - monotonic()
                other = self._next(question, patient=left > 0)
                if other is None:
                    self.bell.wait(left if left > 0 else -1)
                else:
                    self._perform(other)
                del other
            self.order.follow(job.stream, question.result)
            return question.take()
        finally:
            job.question = job.asking = None
            question.close()


def _holds_up(other: Job, job: Job) -> bool:
    """Whether `job` can only run after the question of `other`, a running job, and has waited too long for it."""
    question = other.asking
    if question is None or question.answered:
        return False
    if other.where is None and (job.owner is None or other.owner is not job.owner):
        return False  # the job runs while the question is open
    since = monotonic() - max(question.since, job.since)
    return since > (PATIENCE if other.held_up else HELD_UP)


def _tells_loss(error: BaseException) -> bool:
    """Whether an exception of a job tells that the device has failed, and not the job."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    return bool(LOST.search(text)) and not NOT_LOST.search(text)


def _nearer(*seconds: float | None) -> float | None:
    return min((some for some in seconds if some is not None), default=None)


_workers: dict[torch.device, Worker] = {}  # each until its last engine is gone, its device fails, or a fork


def _forked() -> None:
    """Start anew in the child of a fork: its workers' threads do not exist, and one may have held the lock."""
    global _lock
    _lock = threading.RLock()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def worker_of(device: torch.device) -> Worker:
    """The worker of a device; a new one where there is none."""
    device = torch.device("cpu") if device.type == "cpu" else torch.device(device.type, device.index or 0)
    with _lock:
        return _workers.setdefault(device, _workers.get(device) or Worker(device))


def _notify(loop: asyncio.AbstractEventLoop, finished: asyncio.Future[None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and no coroutine waits
        loop.call_soon_threadsafe(finished.cancel)
