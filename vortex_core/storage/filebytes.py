"""The bytes of one file, read without mapping it: what is cut or replaced meanwhile is an error and never a signal."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path


class FileChanged(OSError):
    """The file is shorter or younger than it was when it was opened."""


class FileBytes:
    """A regular file's bytes, for several threads at once. Closed with its last reference. Raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0) if os.name == "nt" else open(path, "rb", 0, opener=_open)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._stamp = self._now()
        self._changed = os.fstat(self._file.fileno()).st_ctime_ns  # also by who sets the time of writing back
        self.size = self._stamp[0]

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is a pipe or a device, not a file")
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` with what is at `offset`. Raises `OSError`, also where the file ends before."""
        while memory:
            count = self._some(offset, memory)
            if not count:
                raise FileChanged(f"{self.path.name} ends before byte {offset + len(memory)}")
            offset, memory = offset + count, memory[count:]

    def take(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`."""
        found = bytearray(count)
        self.read(offset, memoryview(found))
        return bytes(found)

    def head(self, count: int) -> bytes:
        """The first `count` bytes, or fewer where it has no more."""
        return self.take(0, min(count, self.size))

    def check(self) -> None:
        """Raise `FileChanged` where the file was written to since it was opened."""
        if self._now() != self._stamp:
            raise FileChanged(f"{self.path.name} was written to while it was read")

    def is_at(self, path: Path) -> bool:
        """Whether this, and not another file, is what lies at `path`. Raises `OSError`."""
        return os.path.samestat(path.stat(), os.fstat(self._file.fileno()))

    @property
    def is_as_opened(self) -> bool:
        """Whether it lies where it did, and nothing happened to it since. Raises `OSError`."""
        return self.is_at(self.path) and os.fstat(self._file.fileno()).st_ctime_ns == self._changed

    def _some(self, offset: int, memory: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [memory], offset)
        with self.path.open("rb", buffering=0) as own:  # Windows: a handle has one position for all threads
            own.seek(offset)
            return own.readinto(memory)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or opening a pipe waits for whoever writes to it
