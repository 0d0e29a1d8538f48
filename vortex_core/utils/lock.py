"""One process at a time, where the file system can say so.

A lock here saves work that would be done twice; files are whole without it, since they are renamed when they are.
So a folder that cannot lock, or does not answer, is none to wait for.
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
    """Asks for `path`, a file made for it, when entered; the file is gone when it is left.

    `refused` is why there will be no lock, once `answered`.
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
        except OSError as error:  # such as another user's
            self.refused = error
            self._answer.set()
        else:
            # in a thread: on some network drives the call itself does not come back
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
        """Who holds it, in words."""
        try:
            with self.path.open("rb") as file:
                said = file.read(200).decode(errors="replace")
        except OSError:
            said = ""
        return said if said.isprintable() and said else "another process"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._left = True
            if self._answer.is_set() and hasattr(self, "_file"):
                with contextlib.suppress(OSError):  # before it is free: whoever waits for it looks for the work first
                    self.path.unlink(missing_ok=True)
                os.close(self._file)


def _flock(file: int) -> None:
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "no flock")
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
