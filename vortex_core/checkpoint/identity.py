"""A digest of a model's files, to recognise them again and to notice changes."""

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
    """A digest of header, size, modification time and sampled blocks of each file. Reads about 1 MB of each."""
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
    """Raise `VortexCheckpointError` unless the files of `raw` still have the identity `before`; `where` names them.

    They must also be the files that were opened: others may have taken their place even before `before` was computed.
    """
    try:
        unchanged = raw.is_as_opened and identity(raw.files) == before
    except OSError:  # a file is gone, which is a change, too
        unchanged = False
    if not unchanged:
        raise VortexCheckpointError(
            f"{where} changed while it was read, so nothing of it was kept. Try again when nobody writes to it.",
            path=where,
        )
