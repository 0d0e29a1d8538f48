"""What the files in the host's model folders hold, read from their headers: models, and the parts of models.

LoRAs are listed by name alone. The nodes pick from these lists. They never build a path from a workflow's text.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import Any

from ..vortex_core.errors import VortexCheckpointError, VortexError, quoted
from ..vortex_core.storage.refused_formats import ARCHITECTURES
from . import places
from .places import KINDS, LORAS, MODELS, PARTS, TENSORS

READ = (*ARCHITECTURES, None)  # of GGUF files; None: the file does not say
ARCHITECTURE = b"general.architecture"
PATIENCE = 0.3  # seconds for reading headers; then lists are made of what was read so far
AT_LEAST = 64  # headers that are read for a list, however long they take; one takes a few milliseconds
KNOWN = 2**16  # files whose contents are remembered
MODEL_FILES = 10_000  # of a model folder; the released one has 30


def models() -> dict[str, Path]:
    """Diffusers folders, and files that hold FLUX.1-schnell's transformer, by the name the loader shows."""
    return _holding(
        {name: path for kind in MODELS for name, path in places.found(kind).items()},
        lambda path: places.is_model_folder(path) or "transformer" in held(path) or _needs_gguf(path),
    )


def parts(part: str, patient: bool = False) -> dict[str, Path]:
    """Files that hold `clip`, `t5` or `vae`, by their names below the folder, as the host's own loaders show them.

    `patient`: all of them, however long reading takes.
    """
    kind = PARTS[part]
    listed = _holding(places.found(kind), lambda path: part in held(path), patient)
    return {name.removeprefix(f"{kind}/"): path for name, path in listed.items()}


def loras() -> dict[str, Path]:
    """Files that may be LoRAs, of any model, by their names below the folder, as the host's own loader shows them."""
    found = places.found(LORAS)
    return {name.removeprefix(f"{LORAS}/"): path for name, path in found.items() if path.suffix.lower() in TENSORS}


def pick(name: str) -> Path | None:
    """The file or folder `kind/sub/name`, listed or not; None where there is none.

    Raises `VortexCheckpointError`, with the reason, for one that may not be read.
    """
    kind = name.partition("/")[0]
    if kind not in KINDS:
        return None
    return places.found(kind).get(name) or places.search(kind, name.removeprefix(f"{kind}/"))


def fingerprint(path: Path) -> str:
    """A digest of the model's files by name, size and time: reading 34 GB would take too long.

    Raises `VortexCheckpointError` for a link that leads out of the host's model folders, and for a folder with too many
    files.
    """
    root = path.resolve()
    inside = (str(root), *places.allowed())
    digest = hashlib.sha256(str(root).encode(errors="surrogateescape"))
    for file in sorted(_files(root)) if root.is_dir() else [root]:
        if not places.is_inside(os.path.realpath(file), inside):
            raise VortexCheckpointError(
                f"{file} is a link that leads out of its model folder, and is not followed. Put the file itself there.",
                path=str(file),
            )
        stat = file.stat() if file.exists() else file.lstat()
        line = f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def look(path: Path) -> dict[str, Any]:
    """The parts of FLUX.1-schnell at `path`, at least one, with their sizes, from headers.

    Raises `VortexCheckpointError` where it is another model, damaged, or needs a package that is missing.
    """
    from ..vortex_core.checkpoint.bundle import describe, find_parts

    architecture = _architecture(path)
    if architecture not in READ:  # refused before the rest is read: a language model's vocabulary takes long
        raise VortexCheckpointError(
            f"{quoted(path.name)} is a GGUF file of {quoted(architecture)}, which is no part of FLUX.1-schnell.",
            path=str(path),
        )
    try:
        found, configs = find_parts(path, {})
        parts = {kind: describe(kind, part, configs.get(kind)) for kind, part in found.items()}
    except VortexError:
        raise
    except Exception as error:  # whatever lies there
        raise VortexCheckpointError(
            f"{quoted(str(path))} cannot be read ({type(error).__name__}: {quoted(str(error))}). Download it again.",
            path=str(path),
        ) from error
    if not parts:
        raise VortexCheckpointError(
            f"{quoted(path.name)} holds no part of FLUX.1-schnell that Vortex knows (transformer, text encoders or "
            "VAE).",
            path=str(path),
        )
    return parts


def held(path: Path) -> Mapping[str, Any]:
    """The parts that a file holds, as `look` gives them. Empty for a folder or another file; the log says why.

    A file is read again only when its size or time changes.
    """
    stamp = _stamp(path)
    if stamp is None:
        return {}
    known = _known.get(path)
    if known is None or known[0] != stamp:
        if len(_known) >= KNOWN:
            _known.clear()
        known = _known[path] = stamp, _contents(path)
    return known[1]


def _contents(path: Path) -> Mapping[str, Any]:
    try:
        return look(path)
    except Exception as error:  # else the host would lose the node's whole list
        places.say_once(logging.INFO, f"{quoted(path.name)} is not for Vortex: {error}")
        return {}


def _stamp(path: Path) -> tuple[int, int] | None:
    """The size and time of a regular file."""
    try:
        stat = path.stat()
    except OSError:  # it went away
        return None
    return (stat.st_size, stat.st_mtime_ns) if S_ISREG(stat.st_mode) else None


def _is_known(path: Path) -> bool:
    known = _known.get(path)
    return known is not None and known[0] == _stamp(path)


_known: dict[Path, tuple[tuple[int, int], Mapping[str, Any]]] = {}
_until = 0.0  # the time at which the lists that the host asks for now stop reading
_reader: threading.Thread | None = None


def _holding(found: Mapping[str, Path], wanted: Callable[[Path], bool], patient: bool = False) -> dict[str, Path]:
    """Those of `found` that are `wanted`, as far as headers are read within `PATIENCE`. A thread reads the others."""
    global _until, _reader
    if found:
        from ..vortex_core.checkpoint import bundle  # noqa: F401  # slow the first time: not part of `PATIENCE`
    if time.monotonic() > _until + PATIENCE:
        _until = time.monotonic() + PATIENCE
    listed, read, left = {}, 0, []
    for name, path in found.items():
        if not _is_known(path):
            if not patient and read >= AT_LEAST and time.monotonic() > _until:
                left.append(path)
                continue
            read += 1
        if wanted(path):
            listed[name] = path
    if left and (_reader is None or not _reader.is_alive()):
        places.say_once(logging.INFO, "There are many files in the model folders: some are listed after R is pressed.")
        _reader = threading.Thread(target=_read, args=(left,), name="vortex-headers", daemon=True)
        _reader.start()
    return listed


def _read(paths: list[Path]) -> None:
    for path in paths:
        held(path)
        time.sleep(0.002)  # lets a list that is made meanwhile have the interpreter


def _files(root: Path) -> Iterator[Path]:
    """All files below a model folder. Raises `VortexCheckpointError` for more than `MODEL_FILES` entries."""
    count, folders = 0, [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                if count > MODEL_FILES:
                    raise VortexCheckpointError(
                        f"{root} holds more than {MODEL_FILES:,} files, which is no model's folder.", path=str(root)
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    yield Path(entry.path)


def _needs_gguf(path: Path) -> bool:
    """Whether this is a GGUF file and its package is missing. It is listed, so that loading it says what to install."""
    return path.suffix.lower() == ".gguf" and find_spec("gguf") is None and _architecture(path) in ("flux", "pig", None)


def _architecture(path: Path) -> str | None:
    """The architecture that a GGUF file names in its first bytes; None if it names none, and for other files."""
    if path.suffix.lower() != ".gguf":
        return None
    try:
        with path.open("rb") as file:
            _, key, value = file.read(4096).partition(ARCHITECTURE)
    except OSError:
        return None
    size = int.from_bytes(value[4:12], "little")  # a string: its type, its length, and its letters
    return value[12 : 12 + size].decode(errors="replace") if key and value[:4] == b"\x08\0\0\0" else None
