"""What the files of a model are, so that they are known again, and seen to change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import VortexCheckpointError

if TYPE_CHECKING:
    from ..storage.files import Raw

SAMPLES, SAMPLE = 16, 64 * 1024  # blocks read from each file, and their size


def identity(files: Iterable[Path]) -> str:
    """What `files` are: header, size, modification time and sampled blocks of each. Reads about 1 MB a file."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), 64 * SAMPLE)))
            for i in range(SAMPLES):
                file.seek(max(0, status.st_size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def check_unchanged(raw: Raw, before: str, where: str) -> None:
    """Raise `VortexCheckpointError` unless the files of `raw` have the identity `before`; `where` names them.

    They must be those that were opened, too: `before` may be of others, which took their place before it was found.
    """
    try:
        unchanged = raw.is_as_opened and identity(raw.files) == before
    except OSError:  # gone, which is a change, too
        unchanged = False
    if not unchanged:
        raise VortexCheckpointError(
            f"{where} changed while it was read, so nothing of it was kept. Try again when nobody writes to it.",
            path=where,
        )
