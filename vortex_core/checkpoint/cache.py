"""Quantized weights on disk, so that a file is quantized once in its life.

An entry is addressed by what its source is (headers, sizes, times, sampled blocks), never by where it lies, and is
an ordinary NF4 file beside a small manifest. Several processes may use one cache at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..errors import VortexCheckpointError, VortexWarning
from .dialect import Part
from .files import SafetensorsFiles
from .materialize import UNQUANTIZED, Target
from .tensors import Stored, Tensors
from .write import Named, write_nf4

log = logging.getLogger(__name__)

FORMAT = 1  # of what is written; a new one never reads the old
SMALLEST = 256 * 10**6  # bytes of a source; quantizing less takes no time worth saving
LIMIT = 60 * 10**9  # bytes of all entries
CACHED = ("transformer", "t5")  # the parts that are quantized
SAMPLES, SAMPLE = 16, 64 * 1024  # blocks read from each file, and their size


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached part. `nbytes` of the file; `used` is seconds since the epoch."""

    path: Path
    source: str
    kind: str
    sha256: str
    nbytes: int
    used: float


def default_folder() -> Path:
    """`$VORTEX_CACHE`, else the user's cache folder."""
    if "VORTEX_CACHE" in os.environ:
        return Path(os.environ["VORTEX_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "vortex"


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


class Cache:
    """The entries of one folder; made when first written to."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = folder or default_folder()
        self.limit = limit
        self._paths: dict[tuple[Part, str], Path] = {}

    def quantized(self, part: Part, kind: str, modules: Iterable[Named], target: Target) -> Tensors:
        """The part's tensors with linears in NF4, from the cache where it has them, else put there first.

        Parts that are NF4 already, small or not in files come back as they are; so does a part whose entry cannot
        be written, with a `VortexWarning`.
        """
        if not worth_caching(part):
            return part.tensors
        path = self.path_of(part, kind)
        try:
            kept = self._open(path)
            if kept is None:
                self._write(path, part, kind, modules, target)
                kept = Stored(SafetensorsFiles(path, [path]), trusted=True)
            os.utime(path)
        except OSError as error:
            warnings.warn(
                f"The quantized weights could not be kept in {self.folder} ({error}); the next load quantizes again. "
                "Give cache_dir= a folder with room.",
                VortexWarning,
                stacklevel=2,
            )
            return part.tensors
        return kept

    def _open(self, path: Path) -> Stored | None:
        """The entry at `path`, if there is one; a damaged one is removed."""
        if not path.exists():
            return None
        try:
            return Stored(SafetensorsFiles(path, [path]), trusted=True)
        except VortexCheckpointError as error:
            log.warning("Quantizing again: %s", error)
            path.unlink()
            return None

    def lacks(self, part: Part, kind: str) -> bool:
        """Whether `quantized` would have to quantize and write this part."""
        return kind in CACHED and worth_caching(part) and not self.path_of(part, kind).exists()

    def path_of(self, part: Part, kind: str) -> Path:
        """Where the part's entry is, or would be. Reads the files' identity, once."""
        if (part, kind) not in self._paths:
            key = f"{FORMAT} {kind} {part.stored.prefix} {part.words} {UNQUANTIZED} {identity(part.stored.raw.files)}"
            name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
            self._paths[part, kind] = self.folder / name
        return self._paths[part, kind]

    def _write(self, path: Path, part: Part, kind: str, modules: Iterable[Named], target: Target) -> None:
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():  # another process was first
                return
            for leftover in self.folder.glob(f".{path.name}.*.part"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            started = time.perf_counter()
            source = {"source": part.stored.raw.where, "kind": kind, "vortex": __version__}
            sha256 = write_nf4(path, part.tensors, modules, target, source)
            manifest = {**source, "words": part.words, "format": FORMAT, "sha256": sha256}
            path.with_suffix(".json").write_text(json.dumps(manifest, indent=1))
            log.info("Quantized %s into %s in %.1f s", part.stored.raw.where, path, time.perf_counter() - started)
        self._shrink(keep=path)

    def entries(self) -> list[Entry]:
        """All entries, the latest used first."""
        return sorted(self._entries(), key=lambda entry: -entry.used)

    def _entries(self) -> Iterator[Entry]:
        for path in self.folder.glob("*.safetensors"):
            try:
                said = json.loads(path.with_suffix(".json").read_text())
                status = path.stat()
            except (OSError, ValueError):  # no entry of ours, or another process is just removing it
                continue
            yield Entry(path, said["source"], said["kind"], said["sha256"], status.st_size, status.st_mtime)

    def clear(self) -> int:
        """Remove every entry, and what killed processes left half-written; the bytes of the entries."""
        for leftover in self.folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        return sum(self._remove(entry) for entry in self.entries())

    def damaged(self) -> Iterator[tuple[Entry, bool]]:
        """Read every entry whole, and say whether it differs from what was written."""
        for entry in self.entries():
            with entry.path.open("rb") as file:
                yield entry, hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256

    def _shrink(self, keep: Path) -> None:
        total = 0
        for entry in self.entries():
            total += entry.nbytes
            if total > self.limit and entry.path != keep:
                log.info("Cache over %.0f GB: removing %s, used least lately", self.limit / 1e9, entry.path)
                self._remove(entry)

    def _remove(self, entry: Entry) -> int:
        for suffix in (".safetensors", ".json", ".lock"):
            entry.path.with_suffix(suffix).unlink(missing_ok=True)
        return entry.nbytes


def worth_caching(part: Part) -> bool:
    """Whether quantizing this part takes long enough to keep the result, and can be told apart by its files."""
    return bool(part.stored.raw.files) and not part.is_nf4 and part.nbytes >= SMALLEST
