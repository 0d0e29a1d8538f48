"""Ctrl-C while a command runs: it ends the process with one sentence that says what was written.

It ends the process at once, so that no import of a library turns it into a traceback. `raises` says that there is
something to clean up: the first Ctrl-C is then a `KeyboardInterrupt`, and only the second ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CANCELLED = 130


class Tally:
    """Counts how many of `total` pictures are written."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, total: int) -> None:
        """Start to count: nothing is written yet."""
        self.written, self.total = 0, total

    @property
    def sentence(self) -> str:
        """What a cancelled command says."""
        if not self.written:
            return "cancelled; nothing was written"
        are = "picture was" if self.written == self.total == 1 else "pictures were"
        return f"cancelled; {self.written} of {self.total} {are} written"


tally = Tally()  # a process runs one command
_installed = _held = _asked = False


def install() -> None:
    """From now on Ctrl-C ends the process at once, unless its parent has Ctrl-C ignored, as nohup does."""
    global _installed
    _installed = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    ends()


def raises() -> None:
    """From now on the first Ctrl-C is a `KeyboardInterrupt`. Call it when there is something to clean up."""
    _handle(_raise)


def ends() -> None:
    """From now on Ctrl-C ends the process at once: there is nothing to clean up any more."""
    _handle(_leave)


def ignore() -> None:
    """From now on Ctrl-C does nothing: only the interpreter's own end is left."""
    _handle(signal.SIG_IGN)


def _handle(how: Any) -> None:
    if _installed:
        signal.signal(signal.SIGINT, how)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C waits for the end of this block, so that a file and its count change together."""
    global _held, _asked
    _held = True
    try:
        yield
    finally:
        _held = False
        if _asked:
            _asked = False
            raise KeyboardInterrupt


def _raise(*_: Any) -> None:
    global _asked
    signal.signal(signal.SIGINT, _leave)
    if _held:
        _asked = True
    else:
        raise KeyboardInterrupt


def _leave(*_: Any) -> None:
    shown = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""  # show the cursor, which bars hide
    try:
        os.write(2, f"{shown}{tally.sentence}\n".encode())
    finally:
        os._exit(EXIT_CANCELLED)
