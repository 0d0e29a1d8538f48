"""Writes files whole or not at all. An existing file is replaced only where the caller asks for it."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from ..errors import VortexInputError
from .temporary_files import temporary


def check_folder(folder: Path) -> None:
    """Raise `VortexInputError` unless `folder` exists and a file can be written there. Nothing is left in it."""
    if not folder.is_dir():
        raise VortexInputError(f"There is no folder {folder}; make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise VortexInputError(
            f"No file can be written into {folder.absolute()} ({error.strerror}); choose another folder."
        ) from error


def check_file(path: Path) -> None:
    """Raise `VortexInputError` unless a file can be written at `path`, which must not be a folder."""
    check_folder(path.parent)
    check_name(path)


def check_name(path: Path) -> None:
    """Raise `VortexInputError` where `path` has too long a name, or is a folder."""
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise VortexInputError(f"{path} cannot be a file ({error.strerror}); choose another name.") from error
    if path.is_dir():
        raise VortexInputError(f"{path} is a folder; choose another name.")


def write(path: Path, data: bytes, *, replace: bool) -> None:
    """Write `data` to `path`, with the permissions that the umask leaves.

    Raises `FileExistsError` where `path` exists and `replace` is False, and `OSError` where it cannot be written; then
    nothing is left. What a killed process left is removed by the next write into the folder.
    """
    if replace and path.exists() and not path.is_file():  # a pipe or /dev/null is written to, not replaced
        path.write_bytes(data)
        return
    with temporary(path) as part:
        with part.open("xb") as file:
            file.write(data)
        if replace:
            part.replace(path)
        else:
            _rename_new(part, path)


def add_line(path: Path, line: bytes) -> None:
    """Append a line to a log in one write, on a new line even after a half line that another process left.

    Raises `OSError`; then nothing of the line is left.
    """
    with path.open("a+b", buffering=0) as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0  # a pipe is neither read nor cut
        if size:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line + b"\n")
        if written != len(line) + 1:
            if stat.S_ISREG(status.st_mode):
                file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _rename_new(part: Path, path: Path) -> None:
    """Rename `part` to `path`. Raises `FileExistsError` where that exists."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: take the name first, then replace it
        path.touch(exist_ok=False)
        try:
            part.replace(path)
        except BaseException:
            path.unlink()
            raise
