"""A call that a worker runs (device/worker.py), and what code inside it may do: check, ask its caller, warn."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from ..errors import DeadlineError, VortexInputError, quoted
from ..utils.inference_mode import inference_mode
from ..utils.numeric import finite

if TYPE_CHECKING:
    from .worker import Worker

PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")

T = TypeVar("T")
Args = TypeVarTuple("Args")
Where = tuple[str, int, str, dict[Any, Any]]  # file, line, module, the module's registry of warnings

asked: ContextVar[tuple[Question, ...]] = ContextVar(
    "vortex_asked", default=()
)  # whose functions this code is inside of


class Cancelled(BaseException):
    """Raised inside a job whose caller is gone. No caller sees it, and no `except Exception` catches it."""


class Bell:
    """Wakes one waiting thread. Even a finalizer may ring it, at any moment, where an Event's plain lock might hang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the thread that waits, or else the next one that will."""
        with suppress(RuntimeError):  # rung already
            self._lock.release()

    def wait(self, timeout: float = -1) -> None:
        """Wait until it rings, or for `timeout` seconds."""
        self._lock.acquire(timeout=timeout)


class Outcome:
    """The result or the error of a call. `take` removes it, so that it keeps no memory."""

    result: Any = None
    error: BaseException | None = None

    def take(self) -> Any:
        """Return the result, or raise the error: the same object, with the frames of both threads."""
        result, error = self.result, self.error
        self.result = self.error = None
        if error is None:
            return result
        context = error.__context__
        try:
            raise error
        finally:
            if context is not None:  # `raise` has replaced it by what the caller handles now
                error.__context__ = context
            del error, context  # the exception refers to this frame


class Job(Outcome):
    """A submitted call. `where`, the line to warn at, is set for a coroutine, which cannot be asked.

    `question` waits until the caller answers it. `asking` is the same question, until the job goes on.
    """

    notify: Callable[[], None]
    where: Where | None = None

    def __init__(self, worker: Worker, call: Callable[[], Any], owner: object, deadline: float | None) -> None:
        seconds = finite(deadline)
        if deadline is not None and (seconds is None or seconds <= 0):
            raise VortexInputError(
                f"deadline is a number of seconds above 0, such as 30, and finite, not {quoted(deadline)}."
            )
        self.deadline, self.since = seconds, monotonic()
        self.limit = None if seconds is None else self.since + seconds
        self.worker, self.owner = worker, owner
        self.call: Any = call
        self.context: Any = copy_context()
        self.stream = worker.order.foreign()
        # the question whose function submitted this job: its job waits for this one
        self.origin = next((q for q in reversed(asked.get()) if q.open and q.worker is worker), None)
        self.question: Question | None = None
        self.asking: Question | None = None
        self.running = self.done = self.gone = False
        self.held_up = False  # another call gave up, because this job's question was not answered

    def check(self) -> None:
        """Raise what ends the job early: its caller is gone, its deadline has passed, its device is lost."""
        if self.gone:
            raise Cancelled
        self.worker.check()
        if self.limit is not None and monotonic() > self.limit:
            raise DeadlineError(
                f"The call took longer than its deadline of {self.deadline:g} s, and was stopped. Give it more time.",
                deadline=self.deadline,
            )

    def pause(self) -> float | None:
        """Seconds that it may still wait in the queue; None where it runs, or has no deadline."""
        return None if self.running or self.limit is None else max(0.0, self.limit - monotonic())

    def finish(self) -> None:
        """End the job. It lets go of what it held, and of its result where the caller is gone."""
        self.call = self.context = self.owner = self.origin = self.where = self.stream = None
        if self.gone:
            self.result = self.error = None
        self.done = True


class Question(Outcome):
    """A function that a job has run on the thread of its caller. It is `open` until the job goes on."""

    def __init__(self, job: Job, call: Callable[[], Any]) -> None:
        self.worker, self.owner = job.worker, job.owner
        self.call: Any = call
        self.since = monotonic()
        self.open, self.answered = True, False

    def answer(self) -> None:
        """Run the function on this thread, and wake the worker."""
        before = asked.get()
        try:
            asked.set((*before, self))
            with inference_mode():
                self.result = self.call()
        except BaseException as error:
            self.error = error
        finally:
            asked.set(before)  # not by a token: an interrupt after `set` would take it away
        self.answered = True
        self.worker.bell.ring()

    def close(self) -> None:
        """End the question: its job goes on, or has ended."""
        self.open = False
        self.call = self.owner = self.result = self.error = None


class _Here(threading.local):
    worker: Worker | None = None  # whose thread this is
    job: Job | None = None  # the job that runs on it


here = _Here()


def check() -> None:
    """Raise where the running job must end: its deadline has passed, or its caller is gone. Called at every step."""
    if (job := here.job) is not None:
        job.check()


def ask(function: Callable[[Unpack[Args]], T], *args: *Args) -> T:
    """Run `function(*args)` on the thread and in the context of the job's caller; here where no job runs.

    A coroutine's thread does not wait, so for `arun` it runs here, in a copy of the context. What it raises is raised
    here. Meanwhile the worker runs jobs that it submits, and after `PATIENCE` seconds those of other owners.
    """
    job = here.job
    return function(*args) if job is None else job.worker.ask(job, partial(function, *args))


def inside(owner: object) -> bool:
    """Whether this code runs inside a function that a job of `owner` asked for."""
    return any(question.open and question.owner is owner for question in asked.get())


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package that made the call. Raises where a filter makes warnings errors."""
    job = here.job
    if job is None:
        warnings.warn_explicit(message, category, *outside())
    elif job.where is not None:
        warnings.warn_explicit(message, category, *job.where)
    else:
        ask(warn, message, category)


def outside() -> Where:
    """The innermost line outside this package, by its folder: inside another package it has another name."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(PACKAGE) and frame.f_back is not None:
        frame = frame.f_back
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    return frame.f_code.co_filename, frame.f_lineno, names.get("__name__", "<unknown>"), registry
