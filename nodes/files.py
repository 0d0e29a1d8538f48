"""What the files in the host's model folders hold, told by headers: models, and the parts that single files lack.

The nodes pick from these tables and never build a path from what a workflow says.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISREG
from typing import Any

from ..vortex_core.errors import VortexCheckpointError, VortexError, quoted
from . import places
from .places import MODELS, PARTS

READ = ("flux", "pig", "t5", "t5encoder", None)  # `pig` is what one public converter writes of any model
ARCHITECTURE = b"general.architecture"
PATIENCE = 0.2  # seconds that a table may take to read headers; what is left is read in the background
MODEL_FILES = 10_000  # of a model folder; the released one has 30


def models() -> dict[str, Path]:
    """Diffusers folders, and files that hold FLUX.1-schnell's transformer, by the name the loader shows."""
    return _holding(
        {name: path for kind in MODELS for name, path in places.found(kind).items()},
        lambda path: places.is_model_folder(path) or "transformer" in held(path) or _needs_gguf(path),
    )


def parts(part: str) -> dict[str, Path]:
    """Files that hold `clip`, `t5` or `vae`, by their names below the folder, as the host's own loaders show them."""
    kind = PARTS[part]
    listed = _holding(places.found(kind), lambda path: part in held(path))
    return {name.removeprefix(f"{kind}/"): path for name, path in listed.items()}


def pick(name: str) -> Path | None:
    """What is called so, `kind/sub/name`, listed or not; None where there is nothing.

    Raises `VortexCheckpointError`, with the reason, for what may not be read.
    """
    kind = name.partition("/")[0]
    if kind not in {*MODELS, *PARTS.values()}:
        return None
    return places.found(kind).get(name) or places.search(kind, name.removeprefix(f"{kind}/"))


def fingerprint(path: Path) -> str:
    """Changes when a file of the model does: names, sizes and times, since 34 GB take too long to read.

    Raises `VortexCheckpointError` for a file that a link leads out of the host's model folders, and for a folder that
    no model has.
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
    """The parts of FLUX.1-schnell at `path` with their sizes, from headers.

    Raises `VortexCheckpointError` where it is another model, damaged, or needs a package that is missing.
    """
    from ..vortex_core.checkpoint.bundle import describe, find_parts

    try:
        found, configs = find_parts(path, {})
        return {kind: describe(kind, part, configs.get(kind)) for kind, part in found.items()}
    except VortexError:
        raise
    except Exception as error:  # of any file that lies there
        raise VortexCheckpointError(
            f"{quoted(str(path))} cannot be read ({type(error).__name__}: {quoted(str(error))}). Download it again.",
            path=str(path),
        ) from error


def held(path: Path) -> Mapping[str, Any]:
    """What a file holds, in `look`'s terms; nothing of a folder, nor of what is no model, which the log then says."""
    try:
        stat = path.stat()
    except OSError:  # it went away
        return {}
    if not S_ISREG(stat.st_mode):
        return {}
    return contents(path, (stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=2**16)
def contents(path: Path, stamp: tuple[int, int]) -> Mapping[str, Any]:
    """As `look`, once for each size and time of a file; nothing, and a line in the log, where that raises."""
    try:
        architecture = _architecture(path)
        if architecture not in READ:  # the vocabulary of a language model takes long to read
            raise VortexCheckpointError(f"its architecture is {quoted(architecture)}, which is no part of FLUX.1")
        found = look(path)
        if not found:
            raise VortexCheckpointError("it holds no part of FLUX.1-schnell")
        return found
    except Exception as error:  # the host would lose the node's whole list
        places.say_once(logging.INFO, f"{quoted(path.name)} is not for Vortex: {error}")
        return {}


_reader: threading.Thread | None = None


def _holding(found: Mapping[str, Path], wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """Those of `found` that are `wanted`, as far as their headers can be read in a moment."""
    global _reader
    until, listed, unread = time.monotonic() + PATIENCE, {}, []
    for name, path in found.items():
        if time.monotonic() > until:
            unread.append(path)
        elif wanted(path):
            listed[name] = path
    if unread and (_reader is None or not _reader.is_alive()):
        places.say_once(logging.INFO, f"{len(unread)} model files are still being read: press R in a while.")
        _reader = threading.Thread(target=lambda: [held(path) for path in unread], name="vortex-headers", daemon=True)
        _reader.start()
    return listed


def _files(root: Path) -> Iterator[Path]:
    """Everything in a model folder but folders of its own. Raises `VortexCheckpointError` for too much of it."""
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
    """Listed without being read, so that loading it can say what to install."""
    return path.suffix.lower() == ".gguf" and find_spec("gguf") is None and _architecture(path) in ("flux", "pig", None)


def _architecture(path: Path) -> str | None:
    """What a GGUF file says in its first bytes; None where it does not, and of other files."""
    if path.suffix.lower() != ".gguf":
        return None
    try:
        with path.open("rb") as file:
            _, key, value = file.read(4096).partition(ARCHITECTURE)
    except OSError:
        return None
    size = int.from_bytes(value[4:12], "little")  # a string: its type, its length, and its letters
    return value[12 : 12 + size].decode(errors="replace") if key and value[:4] == b"\x08\0\0\0" else None
