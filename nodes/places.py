"""What may be a model below the host's model folders, by names alone: no file is opened here.

The search is bounded in depth, folders and entries, and lists only regular files. A link is followed if it stays inside
the folders that the host registered. The log says once why something is not listed.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ..vortex_core.errors import VortexCheckpointError, quoted
from . import host

log = logging.getLogger(__name__)

# Registered model folders; ComfyUI's `diffusion_models` is `unet` too, and its `text_encoders` is `clip` too.
MODELS = ("vortex", "diffusers", "diffusion_models", "checkpoints")
PARTS = {"clip": "text_encoders", "t5": "text_encoders", "vae": "vae"}
LORAS = "loras"
KINDS = tuple(dict.fromkeys((*MODELS, *PARTS.values(), LORAS)))
TENSORS = (".safetensors", ".sft")
WEIGHTS = (*TENSORS, ".gguf")
DEPTH = 12  # folders below a registered one
FOLDERS = 5_000  # below a registered one
ENTRIES = 50_000  # of one folder, which take 0.05 s; twice as many below a registered one
LINES = 1_000  # in the log
SETTLED = 2.0  # seconds; no file system keeps times more coarsely


def found(kind: str) -> dict[str, Path]:
    """Model folders and weight files below the registered folders of `kind`, as `kind/sub/name`."""
    names: dict[str, Path] = {}
    for walk in _walks(kind):
        for name, path in walk.models.items():
            names.setdefault(f"{kind}/{name}", path)
    return names


def search(kind: str, below: str) -> Path | None:
    """Any file or folder of this name below the registered folders of `kind`, whatever it is.

    Raises `VortexCheckpointError`, with the reason, for one that may not be read.
    """
    for root in host.model_folders(kind):
        walk = Walk(root, allowed(), every=True)
        if below in walk.models:
            return walk.models[below]
        if below in walk.refused:
            raise VortexCheckpointError(walk.refused[below])
    return None


def allowed() -> tuple[str, ...]:
    """Real paths that links may lead to: the registered folders, and the blobs of a Hugging Face cache's model."""
    roots = [os.path.realpath(root) for kind in KINDS for root in host.model_folders(kind)]
    blobs = [str(repo / "blobs") for root in roots for repo in Path(root).parents if repo.name.startswith("models--")]
    return tuple(dict.fromkeys([*roots, *blobs]))


def is_inside(path: str, folders: tuple[str, ...]) -> bool:
    """Whether a real path lies in one of `folders`."""
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def is_model_folder(path: str | Path) -> bool:
    """Whether this is a model in the diffusers layout."""
    return os.path.isdir(os.path.join(path, "transformer"))


_said: set[str] = set()


def say_once(level: int, message: str) -> None:
    """Log a line once, however often the host asks for the list, and at most `LINES` of them."""
    if message not in _said and len(_said) <= LINES:
        _said.add(message)
        log.log(level, message if len(_said) <= LINES else "Other files are passed over, too; pick one to hear why.")


class Walk:
    """One look below a registered folder: `models` by their names below it, and what is `refused`, with reasons.

    With `every`, `models` has all regular files and folders, whatever they are.
    """

    def __init__(self, root: Path, inside: tuple[str, ...], every: bool = False) -> None:
        self.inside, self.every = inside, every
        self.models: dict[str, Path] = {}
        self.refused: dict[str, str] = {}
        self._changed: dict[str, int] = {}  # times at which the folders that were searched last changed
        self._left = 2 * ENTRIES
        self._cache = host.cache_folder()
        # a folder's own name comes before a link to it; each folder is searched once
        self._real, self._links = deque([("", str(root))]), deque[tuple[str, str]]()
        seen: set[tuple[int, int]] = set()
        started = time.time()
        while self._real or self._links:
            below, folder = (self._real or self._links).popleft()
            if len(seen) == FOLDERS or not self._left:
                what = f"more than {FOLDERS:,} folders or {2 * ENTRIES:,} files"
                self._refuse(f"{below}*", str(root), f"holds {what}, and not all are searched")
                break
            try:
                stat = os.stat(folder)
                self._changed[folder] = stat.st_mtime_ns
                if (identity := (stat.st_dev, stat.st_ino)) not in seen:
                    seen.add(identity)
                    self._search(below, folder)
            except OSError as error:
                self._changed.setdefault(folder, GONE)
                if not isinstance(error, FileNotFoundError):  # most folders that are registered do not exist
                    self._refuse(below, folder, f"is not searched: {error.strerror or error}")
        self.models = dict(sorted(self.models.items(), key=lambda item: item[0].split("/")))
        self._settled = all(changed < (started - SETTLED) * 1e9 for changed in self._changed.values())
        self._until = time.time() + 5 * (time.time() - started)

    @property
    def is_current(self) -> bool:
        """Whether no folder has changed since. After a slow walk recent changes are passed over for a while."""
        if not (self._settled or time.time() < self._until):
            return False
        return all(_changed(folder) == before for folder, before in self._changed.items())

    def _search(self, below: str, folder: str) -> None:
        entries, count, limit = [], 0, min(ENTRIES, self._left)
        with os.scandir(folder) as listing:
            for entry in listing:
                if count == limit:
                    self._refuse(f"{below}*", folder, f"holds more than {limit:,} files, and not all are listed")
                    break
                count += 1
                if self.every or entry.name[-12:].lower().endswith(WEIGHTS) or _is_folder(entry):
                    entries.append(entry)
        self._left -= count
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                self._sort(below + entry.name, entry)
            except OSError as error:  # a link in a circle, a folder that went away
                self._refuse(below + entry.name, entry.path, f"is not listed: {error.strerror or error}")

    def _sort(self, name: str, entry: os.DirEntry[str]) -> None:
        """List, queue or refuse one entry. Raises `OSError` for a link that leads nowhere."""
        if not _is_text(name):
            self._refuse(name, entry.path, "is not listed: its name is not text in UTF-8. Rename it")
        elif entry.name.startswith("._") and not self.every:
            pass  # a Mac leaves one beside each file
        elif entry.is_symlink() and not is_inside(os.path.realpath(entry.path), self.inside):
            self._refuse(
                name,
                entry.path,
                "leads out of ComfyUI's model folders and is not listed; name its folder in extra_model_paths.yaml",
            )
        elif _is_folder(entry):
            if self.every or is_model_folder(entry.path):
                self.models[name] = Path(entry.path)
            if is_model_folder(entry.path):
                return
            if name.count("/") == DEPTH:
                self._refuse(name, entry.path, f"is not searched: it lies {DEPTH} folders deep")
            elif Path(entry.path) != self._cache:
                (self._links if entry.is_symlink() else self._real).append((f"{name}/", entry.path))
        elif entry.is_file():
            self.models[name] = Path(entry.path)
        else:
            os.stat(entry.path)
            self._refuse(name, entry.path, "is not listed: it is no regular file")

    def _refuse(self, name: str, path: str, reason: str) -> None:
        self.refused[name] = f"{quoted(path)} {reason}."


GONE = -1
_known: dict[tuple[Path, tuple[str, ...]], Walk] = {}  # by the folder, and where links may lead


def _walks(kind: str) -> Iterator[Walk]:
    inside = allowed()
    for root in host.model_folders(kind):
        walk = _known.get((root, inside))
        if walk is None or not walk.is_current:
            walk = _known[root, inside] = Walk(root, inside)
            for reason in walk.refused.values():
                say_once(logging.WARNING, reason)
        yield walk


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return GONE


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_text(name: str) -> bool:
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:
        return False
