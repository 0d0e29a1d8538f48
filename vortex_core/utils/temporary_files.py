"""Files that are written under a temporary name, and renamed once they are whole.

All temporary names follow one pattern, which no other program uses. So the next process that writes into a folder
recognizes what a killed process left there, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from .packages import missing

HOST = f"{zlib.crc32(platform.node().encode(errors='replace')):08x}"
NAME = re.compile(r"\.vortex-(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,9})-[0-9a-f]{8}\.part")
OLDER = re.compile(
    r"\.(?:(?:transformer|t5)-[0-9a-f]{24}|diffusion_pytorch_model)\.safetensors\.(?P<pid>\d{1,9})\.part"
)
SILENT = 3600  # seconds without a write, after which a process of another machine counts as gone
SLACK = 5  # seconds by which clocks of files and processes may differ


@contextlib.contextmanager
def partial(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to. At the end it becomes `path`; after an exception it is removed.

    Also removes what killed processes left in the folder. Raises `OSError`.
    """
    with temporary(path) as written:
        yield written
        written.replace(path)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, always removed at the end. Else as `partial`."""
    sweep(path.parent)
    # of fixed length: `path` may have the longest name that the file system allows
    written = path.with_name(f".vortex-{HOST}-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield written
    finally:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)


def parts(folder: Path) -> Iterator[Path]:
    """Every temporary file of Vortex in `folder`, of any process."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if is_part(entry.name) and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


def is_part(name: str) -> bool:
    """Whether this is a name of a temporary file of Vortex."""
    return bool(NAME.fullmatch(name) or OLDER.fullmatch(name))


def sweep(folder: Path) -> None:
    """Remove the temporary files in `folder` whose processes are gone."""
    for path in parts(folder):
        with contextlib.suppress(OSError):
            if is_abandoned(path):
                path.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Whether the process that wrote this temporary file is gone: no where nobody can tell. Raises `OSError`."""
    if missing("psutil") is not None:
        return False
    import psutil

    found = (NAME.fullmatch(path.name) or OLDER.fullmatch(path.name)).groupdict()  # type: ignore[union-attr]
    written = path.stat().st_mtime
    if found.get("host", HOST) != HOST:
        return time.time() - written > SILENT
    try:
        process = psutil.Process(int(found["pid"]))
        # a process that began later only has the same number
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > written + SLACK
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
