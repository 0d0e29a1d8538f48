"""The bytes of a file, read without mapping it: if it is cut or replaced, that is an error and never a signal."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path


class FileChanged(OSError):
    """The file has become shorter, or was written to, since it was opened."""


class FileBytes:
    """A regular file's bytes, for several threads at once. Closed with its last reference. Raises `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0) if os.name == "nt" else open(path, "rb", 0, opener=_open)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._stamp = self._size_and_time()
        self._changed = os.fstat(
            self._file.fileno()
        ).st_ctime_ns  # changes, too, when a program sets the time of writing back
        self.size = self._stamp[0]

    def _size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is a pipe or a device, not a file")
        return status.st_size, status.st_mtime_ns

    def read(self, offset: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes at `offset`. Raises `OSError`, also where the file ends too early."""
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
        """The first `count` bytes, or all where there are fewer."""
        return self.take(0, min(count, self.size))

    def check(self) -> None:
        """Raise `FileChanged` if the file was written to since it was opened."""
        if self._size_and_time() != self._stamp:
            raise FileChanged(f"{self.path.name} was written to while it was read")

    def is_at(self, path: Path) -> bool:
        """Whether `path` is this file, and not another one. Raises `OSError`."""
        return os.path.samestat(path.stat(), os.fstat(self._file.fileno()))

    @property
    def is_as_opened(self) -> bool:
        """Whether the file is still at its path and unchanged. Raises `OSError`."""
        return self.is_at(self.path) and os.fstat(self._file.fileno()).st_ctime_ns == self._changed

    def _some(self, offset: int, memory: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [memory], offset)
        with self.path.open("rb", buffering=0) as own:  # Windows: all threads would share one position
            own.seek(offset)
            return own.readinto(memory)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe waits for its writer
