"""A lock between processes, by a file, where the file system supports it.

It only avoids doing work twice; files are written whole without it. So nobody waits where a folder cannot lock, or
does not answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
import threading
from pathlib import Path
from types import TracebackType


class Lock:
    """Entering asks for a lock on the file `path`, which is made for it; leaving removes the file.

    Once `answered` is True, the lock is held, or `refused` says why it will not be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused: OSError | None = None
        self._answer = threading.Event()
        self._guard = threading.Lock()
        self._left = False

    def __enter__(self) -> Lock:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:  # such as a file of another user
            self.refused = error
            self._answer.set()
        else:
            # in a thread: on some network drives the call itself never returns
            threading.Thread(target=self._ask, name="vortex-lock", daemon=True).start()
        return self

    def _ask(self) -> None:
        try:
            _flock(self._file)
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
                os.write(self._file, f"process {os.getpid()} on {platform.node()}".encode(errors="replace"))
        except OSError as error:
            self.refused = error
        with self._guard:
            self._answer.set()
            if self._left:
                os.close(self._file)

    def answered(self, seconds: float) -> bool:
        """Whether the lock is held, or refused, within `seconds`."""
        return self._answer.wait(seconds)

    def holder(self) -> str:
        """The process that holds the lock, in words."""
        try:
            with self.path.open("rb") as file:
                text = file.read(200).decode(errors="replace")
        except OSError:
            text = ""
        return text if text and text.isprintable() else "another process"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._left = True
            if self._answer.is_set() and hasattr(self, "_file"):
                with contextlib.suppress(OSError):  # still locked: the next process finds the work first
                    self.path.unlink(missing_ok=True)
                os.close(self._file)


def _flock(file: int) -> None:
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "no flock")
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
