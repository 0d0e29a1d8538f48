"""Ctrl-C: one sentence that says what was written, at any moment of a process that runs a command.

It ends the process at once, which no library's import can turn into a traceback, until `raises` says that there is
something to clean up: then the first one is a `KeyboardInterrupt`, and a second one ends it all the same.
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
    """How many of `total` pictures were written so far."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, total: int) -> None:
        """Nothing is written yet."""
        self.written, self.total = 0, total

    @property
    def sentence(self) -> str:
        """What a command that is cancelled says."""
        if not self.written:
            return "cancelled; nothing was written"
        are = "picture was" if self.written == self.total == 1 else "pictures were"
        return f"cancelled; {self.written} of {self.total} {are} written"


tally = Tally()  # a process runs one command
_installed = _held = _asked = False


def install() -> None:
    """From now on Ctrl-C ends the process at once, unless whoever started it ignores Ctrl-C, as nohup does."""
    global _installed
    _installed = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if _installed:
        signal.signal(signal.SIGINT, _leave)


def raises() -> None:
    """From now on the first Ctrl-C is a `KeyboardInterrupt`: call it where there is something to clean up."""
    if _installed:
        signal.signal(signal.SIGINT, _raise)


def ends() -> None:
    """From now on Ctrl-C ends the process at once again: whatever there was to clean up is."""
    if _installed:
        signal.signal(signal.SIGINT, _leave)


def ignore() -> None:
    """From now on Ctrl-C does nothing: everything is done but the interpreter's own end."""
    if _installed:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C waits for the end of this block, so that a file and its count go together."""
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
    shown = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""  # bars hide the cursor
    try:
        os.write(2, f"{shown}{tally.sentence}\n".encode())
    finally:
        os._exit(EXIT_CANCELLED)
