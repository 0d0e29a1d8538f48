"""Files that are written whole or not at all, and never over another one unless that is asked for."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from ..errors import VortexInputError
from .partial import temporary


def check_folder(folder: Path) -> None:
    """Raise `VortexInputError` unless `folder` is there and takes a file. Leaves nothing in it."""
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
    """Raise `VortexInputError` unless a file can be at `path`: its folder takes one, and it is not a folder itself."""
    check_folder(path.parent)
    check_name(path)


def check_name(path: Path) -> None:
    """Raise `VortexInputError` for a name that is too long, or that of a folder."""
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise VortexInputError(f"{path} cannot be a file ({error.strerror}); choose another name.") from error
    if path.is_dir():
        raise VortexInputError(f"{path} is a folder; choose another name.")


def write(path: Path, data: bytes, *, replace: bool) -> None:
    """Write `data` to `path`, with the modes that the umask leaves.

    Raises `FileExistsError` where there is something and `replace` is False, and `OSError` where it cannot be written;
    then nothing is left. What a killed process left goes with the next file that is written there.
    """
    if replace and path.exists() and not path.is_file():  # a pipe, /dev/null: it is written to, not replaced
        path.write_bytes(data)
        return
    with temporary(path) as part:
        with part.open("xb") as file:
            file.write(data)
        if replace:
            part.replace(path)
        else:
            _name(part, path)


def add_line(path: Path, line: bytes) -> None:
    """Add a line to a log, in one piece, and after a half line that somebody left.

    Raises `OSError`; then nothing of it is left.
    """
    with path.open("a+b", buffering=0) as file:
        status = os.fstat(file.fileno())
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0  # of a pipe nothing is read, nor cut
        if size:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line + b"\n")
        if written != len(line) + 1:
            if stat.S_ISREG(status.st_mode):
                file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _name(part: Path, path: Path) -> None:
    try:
        path.hardlink_to(part)
    except FileExistsError:
        raise
    except OSError:  # file systems without links: the name is taken first, then filled
        path.touch(exist_ok=False)
        try:
            part.replace(path)
        except BaseException:
            path.unlink()
            raise
