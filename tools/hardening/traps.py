"""Traps: one of torch's operations in the code of a stage raises, interrupts or kills.

tools/hardening/faults.py and tools/hardening/soak.py use them. A trap knows a stage by the file whose code runs. It
follows a call to the device's own thread, as context variables do.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vortex_core

PACKAGE = str(Path(vortex_core.__file__).parent) + os.sep
OPERATIONS = (
    (torch, "empty"), (torch, "mm"), (torch, "addmm"), (F, "linear"), (F, "conv2d"), (Tensor, "copy_"),
    (F, "scaled_dot_product_attention"), (Tensor, "to"), (Tensor, "cpu"),
)  # fmt: skip
STAGES = {  # the files of vortex_core that are the code of a stage
    "encode": ("flux1/conditioning.py", "flux1/text_encoders.py"),
    "stream copy": ("memory/offload.py",),
    "step": ("flux1/transformer.py", "flux1/step_buffers.py", "flux1/sampling.py"),
    "decode": ("flux1/vae.py", "flux1/decoder_memory.py"),
    "copy out": ("cli/png.py", "cli/pictures.py", "utils/whole_files.py"),
    "cache write": ("checkpoint/write.py", "utils/temporary_files.py"),
}
Act = Callable[[], None]
_set: ContextVar[Trap | None] = ContextVar("trap", default=None)  # follows a call to the device's thread


class Injected(RuntimeError):
    """An exception that no other code raises."""


class Trap:
    """Acts at the `at`-th operation (from 1) of a stage, or of the load of a part; with `stays` at all later ones."""

    def __init__(self, stage: str | None, at: float, act: Act, *, stays: bool = False) -> None:
        self.stage, self.at, self.act, self.stays = stage, at, act, stays
        self.calls = 0

    @property
    def sprung(self) -> bool:
        return self.calls >= self.at

    def step_on(self) -> None:
        if self.stage is not None and not self._here():
            return
        self.calls += 1
        if self.calls == self.at or (self.stays and self.calls > self.at):
            self.act()

    def _here(self) -> bool:
        frame, files = sys._getframe(2), STAGES.get(self.stage or "", ())
        part = (self.stage or "").removeprefix("load ")
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(PACKAGE):
                if path.removeprefix(PACKAGE).replace(os.sep, "/") in files:
                    return True
                if not files and str(getattr(frame.f_locals.get("self"), "where", "")).endswith(os.sep + part):
                    return True
            frame = frame.f_back
        return False

    def __enter__(self) -> Trap:
        self._token = _set.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _set.reset(self._token)


@contextlib.contextmanager
def trapped() -> Iterator[None]:
    """Inside, traps can spring: torch's operations first look for one."""

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if (trap := _set.get()) is not None:
                trap.step_on()
            return operation(*arguments, **options)

        return run

    with torch.device("meta"):  # it remembers the functions that it replaces, so it must see the original ones
        torch.empty(0)
    # inherited methods of torch.Tensor must become visible again, not be copied into it
    before = [(owner, name, vars(owner).get(name), getattr(owner, name)) for owner, name in OPERATIONS]
    for owner, name, _, operation in before:
        setattr(owner, name, wrap(operation))
    try:
        yield
    finally:
        for owner, name, own, _ in before:
            delattr(owner, name) if own is None else setattr(owner, name, own)


def raises(error: Callable[[], BaseException]) -> Act:
    def act() -> None:
        raise error()

    return act


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB (injected)")


def cuda_error() -> BaseException:
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return kind("CUDA error: an illegal memory access was encountered (injected)")


def no_room() -> BaseException:
    return OSError(28, "No space left on device (injected)")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTS = {
    "exception": raises(lambda: Injected("injected")),
    "out of memory": raises(out_of_memory),
    "out of memory, to the end": raises(out_of_memory),
    "Ctrl-C": _thread.interrupt_main,
    "CUDA error": raises(cuda_error),
}
