"""Quantized weights on disk, so that each file is quantized only once.

An entry is an ordinary NF4 file that carries its checksums. Its name is a digest of its source (header, size, time,
sampled blocks), not of the source's path. Several processes may use one cache at the same time. A cache that cannot be
written is still read. An error here costs time, never the picture.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .. import __version__
from ..errors import VortexCheckpointError, VortexInputError, VortexWarning
from ..nf4 import UNQUANTIZED
from ..storage.materialize import Target
from ..storage.tensors import Stored, Tensors
from ..utils.lock import Lock
from ..utils.paths import expanded, user_folder
from ..utils.temporary_files import partial, parts, sweep
from .cache_entry import DamagedEntry, EntryFile, manifest_of, metadata
from .cached_tensors import CachedTensors
from .dialects import Part
from .identity import check_unchanged, identity
from .write import Named, Wanted, write_nf4

log = logging.getLogger(__name__)

FORMAT = 1  # of entries; a new format never reads old ones
SMALLEST = 256 * 10**6  # bytes of a source; less is quantized fast enough each time
LIMIT = 60 * 10**9  # bytes of all entries
CACHED = ("transformer", "t5")  # the parts that are quantized
PATIENCE = 60.0  # seconds to wait for a process that holds the lock and writes nothing
OURS = re.compile(rf"({'|'.join(CACHED)})-[0-9a-f]{{24}}\.(safetensors|json|lock)")


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached part. `nbytes`: of its file. `used`: when it was used last, in seconds since the epoch."""

    path: Path
    source: str
    kind: str
    nbytes: int
    used: float


def default_folder() -> Path:
    """`$VORTEX_CACHE`, else the user's cache folder. Raises `VortexInputError` where there is no home folder."""
    advice = ", so there is no place to keep quantized weights. Name a folder in `cache_dir` or $VORTEX_CACHE."
    return user_folder("VORTEX_CACHE", ("XDG_CACHE_HOME", "LOCALAPPDATA"), ".cache", "vortex", advice)


class Cache:
    """The entries of one folder, by default `default_folder`. The folder is made when an entry is first written.

    Raises `VortexInputError` for a folder that cannot be a path.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = LIMIT) -> None:
        self._given = expanded(folder) if folder is not None and str(folder) else None
        self.limit = limit
        self._identities: dict[Part, str] = {}

    @cached_property
    def folder(self) -> Path:
        """Where the entries are. Raises `VortexInputError` where none was given and there is no default."""
        return self._given or default_folder()

    def quantized(self, part: Part, kind: str, modules: Iterable[Named], target: Target) -> Tensors:
        """The part's tensors with linears in NF4, out of the cache; a missing entry is written first.

        A part that is NF4 already, small or not in files comes back as it is. So does one whose entry cannot be
        written, with a `VortexWarning`. Raises `VortexCheckpointError` where the part's files change meanwhile.
        """
        if not worth_caching(part):
            return part.tensors
        work = _Work(self, part, kind, Wanted.of(modules), target)
        stored = work.entry()
        return part.tensors if stored is None else CachedTensors(stored, work.again, part, target)

    def lacks(self, part: Part, kind: str) -> bool:
        """Whether `quantized` has to quantize this part and write an entry."""
        try:
            return kind in CACHED and worth_caching(part) and not self.path_of(part, kind).exists()
        except (OSError, VortexInputError):  # this cache cannot be used; `quantized` will warn of it
            return False

    def path_of(self, part: Part, kind: str) -> Path:
        """The path of the part's entry, which need not exist. Reads the identity of the part's files, once."""
        key = f"{FORMAT} {kind} {part.stored.prefix} {part.words} {UNQUANTIZED} {self.identity_of(part)}"
        return self.folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def identity_of(self, part: Part) -> str:
        """The identity of the part's files, at the first call."""
        if part not in self._identities:
            self._identities[part] = identity(part.stored.raw.files)
        return self._identities[part]

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first. Raises `OSError` for a folder that cannot be read."""
        return sorted(self._entries(), key=lambda entry: -entry.used)

    def _entries(self) -> Iterator[Entry]:
        for path, kind in self._ours():
            if path.suffix == ".safetensors":
                with contextlib.suppress(OSError):  # another process may be removing it
                    status = path.stat()
                    source = "a file that may not be read"
                    with contextlib.suppress(PermissionError):
                        source = metadata(path).get("source", "damaged")
                    yield Entry(path, source, kind, status.st_size, status.st_mtime)

    def _ours(self) -> Iterator[tuple[Path, str]]:
        """Files with names of entries, their manifests and locks; and the kind in each name."""
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            found, path = OURS.fullmatch(name), self.folder / name
            if found and path.is_file():
                yield path, found[1]

    def clear(self) -> int:
        """Remove every entry, and unfinished files of killed processes; the bytes of the entries.

        Raises `OSError` if something cannot be removed, after removing the rest.
        """
        freed, refused = 0, []
        for path, _ in self._ours():
            try:
                nbytes = path.stat().st_size if path.suffix == ".safetensors" else 0
                path.unlink()
                freed += nbytes
            except FileNotFoundError:  # another process was first
                pass
            except OSError as error:
                refused.append(error)
        sweep(self.folder)
        if refused:
            raise refused[0]
        return freed

    def damaged(self) -> Iterator[tuple[Entry, bool]]:
        """Read every entry to its end; each entry, and whether it is damaged."""
        for entry in self.entries():
            try:
                EntryFile(entry.path).verify()
            except (DamagedEntry, OSError) as error:
                log.warning("%s", error)
                yield entry, True
            else:
                yield entry, False

    def shrink(self, keep: Path) -> None:
        """Remove the least recently used entries until the rest is within the limit; `keep` stays."""
        total = 0
        for entry in self.entries():
            total += entry.nbytes
            if total > self.limit and entry.path != keep:
                log.info("Cache over %.0f GB: removing %s, least recently used", self.limit / 1e9, entry.path)
                with contextlib.suppress(OSError):  # it belongs to another user
                    _remove(entry.path)


@dataclass(frozen=True, slots=True)
class _Work:
    """One part that is put into a cache, and read out of it."""

    cache: Cache
    part: Part
    kind: str
    wanted: Wanted  # from the modules before they were filled
    target: Target

    def entry(self, damaged: EntryFile | None = None) -> Stored | None:
        """The part's entry; a missing or `damaged` one is written anew. None, and a warning, where that fails."""
        try:
            path = self.cache.path_of(self.part, self.kind)
            sweep(path.parent)
            if damaged is not None and damaged.is_at(path):
                _remove(path)
            stored = self._open(path) or self._make(path)
            with contextlib.suppress(OSError):  # another user's entry can be used, but not marked as used
                os.utime(path)
            return stored
        except (OSError, VortexInputError, DamagedEntry) as error:
            warnings.warn(
                f"The quantized weights could not be kept ({error}); the next load quantizes again. "
                "$VORTEX_CACHE can name a folder with room.",
                VortexWarning,
                stacklevel=4,
            )
            return None

    def again(self, stored: Stored, error: Exception) -> Stored | None:
        """The entry, written anew in the place of one that could not be read to its end."""
        log.warning("Quantizing again: %s", error)
        return self.entry(damaged=stored.raw if isinstance(stored.raw, EntryFile) else None)

    def _open(self, path: Path) -> Stored | None:
        """The entry at `path`, or None; a damaged one is removed."""
        try:
            raw = EntryFile(path, self.target.progress)
            if raw.metadata.get("entry", path.stem) != path.stem:
                raise DamagedEntry(f"{path} is the entry {raw.metadata['entry']}, renamed.", path=str(path))
            stored = Stored(raw, trusted=True)
            for name, shape in ({**self.wanted.weights, **self.wanted.plain}).items():
                if (
                    name not in stored
                    or stored.shape(name) != shape
                    or stored.is_nf4(name) != (name in self.wanted.weights)
                ):
                    raise DamagedEntry(f"{path}: {name} is not what this model has.", path=str(path))
            return stored
        except FileNotFoundError:
            return None
        except VortexCheckpointError as error:
            log.warning("Quantizing again: %s", error)
            _remove(path)
            return None

    def _make(self, path: Path) -> Stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_suffix(".lock")) as lock:
            self._wait(lock)
            stored = self._open(path)
            if stored is not None:  # another process was first
                return stored
            self._write(path)
            stored = self._open(path)
        self.cache.shrink(keep=path)
        if stored is None:
            raise DamagedEntry(f"{path} cannot be read back as it was written; look after the disk", path=str(path))
        return stored

    def _wait(self, lock: Lock) -> None:
        """Wait for the lock while another process writes, so that the work is not done twice."""
        seen: object = None
        since, said = time.monotonic(), False
        while not lock.answered(0.2):
            if not said:
                log.info("Waiting for %s, which quantizes the same weights", lock.holder())
                said = True
            self.target.progress(0)  # a load that waits can be cancelled
            written = _written(lock.path.parent)
            if written != seen:
                seen, since = written, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                log.warning("Waited %.0f s for %s, which writes nothing; going on", PATIENCE, lock.holder())
                return
        if lock.refused is not None:
            log.info("%s cannot be locked (%s); going on without", lock.path, lock.refused)

    def _write(self, path: Path) -> None:
        started, where = time.perf_counter(), self.part.stored.raw.where
        said = {"source": where, "kind": self.kind, "vortex": __version__, "words": self.part.words, "entry": path.stem}
        with partial(path) as written:
            write_nf4(written, self.part.tensors, self.wanted, self.target, said)
            check_unchanged(self.part.stored.raw, self.cache.identity_of(self.part), where)
        manifest_of(path).unlink(missing_ok=True)  # of an older entry
        log.info("Quantized %s into %s in %.1f s", where, path, time.perf_counter() - started)


def _written(folder: Path) -> list[tuple[str, int]]:
    """The sizes of the unfinished files in `folder`, by name."""
    found = []
    for path in parts(folder):
        with contextlib.suppress(OSError):
            found.append((path.name, path.stat().st_size))
    return sorted(found)


def _remove(path: Path) -> None:
    for suffix in (".safetensors", ".json", ".lock"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def worth_caching(part: Part) -> bool:
    """Whether quantizing this part takes long enough to keep the result, and its files can identify it."""
    return bool(part.stored.raw.files) and not part.is_nf4 and part.nbytes >= SMALLEST
