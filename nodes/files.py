"""What lies in the host's model folders, told by headers: models, and the parts that single files lack.

The nodes pick from these tables and never build a path from what a workflow says. A link that leads out of all model
folders is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from . import host

log = logging.getLogger(__name__)

# Registered model folders; ComfyUI's `diffusion_models` is `unet` too, and its `text_encoders` is `clip` too.
MODELS = ("vortex", "diffusers", "diffusion_models", "checkpoints")
PARTS = {"clip": "text_encoders", "t5": "text_encoders", "vae": "vae"}
WEIGHTS = (".safetensors", ".gguf")
ARCHITECTURE = re.compile(rb"general\.architecture.{12}([a-z0-9_]+)", re.DOTALL)  # its type and length lie between
READ = ("flux", "t5", "t5encoder", None)


def models() -> dict[str, Path]:
    """Diffusers folders, and files that hold FLUX.1-schnell's transformer, by the name the loader shows."""
    return {
        name: path for kind in MODELS for name, path in _found(kind).items()
        if _is_model_folder(path) or "transformer" in held(path) or _needs_gguf(path)
    }  # fmt: skip


def parts(part: str) -> dict[str, Path]:
    """Files that hold `clip`, `t5` or `vae`, by their names below the folder, as the host's own loaders show them."""
    kind = PARTS[part]
    return {
        name.removeprefix(f"{kind}/"): path for name, path in _found(kind).items()
        if part in held(path)
    }  # fmt: skip


def fingerprint(path: Path) -> str:
    """Changes when a file of the model does: names, sizes and times, since 34 GB take too long to read.

    Raises `VortexCheckpointError` for a file that a link leads out of a model's folder.
    """
    from ..vortex_core.errors import VortexCheckpointError

    root = path.resolve()
    files = [root] if root.is_file() else [Path(base, file) for base, _, files in os.walk(root) for file in files]
    digest = hashlib.sha256(str(root).encode(errors="surrogateescape"))
    for file in sorted(files):
        if not file.resolve().is_relative_to(root):
            raise VortexCheckpointError(
                f"{file} is a link that leads out of its model folder, and is not followed. Put the file itself there.",
                path=str(file),
            )
        stat = file.stat()
        line = f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def look(path: Path) -> dict[str, Any]:
    """The parts of FLUX.1-schnell at `path` with their sizes, from headers.

    Raises `VortexCheckpointError` where it is another model, damaged, or needs a package that is missing.
    """
    from ..vortex_core.checkpoint.bundle import describe, find_parts

    found, configs = find_parts(path, {})
    return {kind: describe(kind, part, configs.get(kind)) for kind, part in found.items()}


@lru_cache(maxsize=4096)
def contents(path: Path, fingerprint: str) -> Mapping[str, Any]:
    """As `look`, once for each `fingerprint`; nothing, and a line in the log, where that raises."""
    try:
        return look(path)
    except Exception as error:  # of any file that lies there; the host would lose the node's whole list
        log.info("%s is not for Vortex: %s", path.name, error)
        return {}


def held(path: Path) -> Mapping[str, Any]:
    """What a file holds, in `look`'s terms; nothing of a folder."""
    if path.is_dir():
        return {}
    try:
        # the vocabulary of a language model in GGUF takes seconds to read
        return contents(path, fingerprint(path)) if _architecture(path) in READ else {}
    except OSError as error:  # it went away
        log.debug("%s is not listed: %s", path, error)
        return {}


def _is_model_folder(path: Path) -> bool:
    return (path / "transformer").is_dir()


def _needs_gguf(path: Path) -> bool:
    """Listed without being read, so that loading it can say what to install."""
    from ..vortex_core.packages import missing

    if path.suffix.lower() != ".gguf" or missing("gguf") is None:
        return False
    with contextlib.suppress(OSError):  # it went away
        return _architecture(path) in ("flux", None)
    return False


def _architecture(path: Path) -> str | None:
    """What a GGUF file says first; None where it does not, and of other files. Raises `OSError`."""
    if path.suffix.lower() != ".gguf":
        return None
    with path.open("rb") as file:
        said = ARCHITECTURE.search(file.read(4096))
    return said[1].decode() if said else None


def _found(kind: str) -> dict[str, Path]:
    """Everything below the registered folders of `kind` that may be a model, as `kind/sub/name`."""
    allowed = [root.resolve() for other in {*MODELS, *PARTS.values()} for root in host.model_folders(other)]
    found: dict[str, Path] = {}
    for root in host.model_folders(kind):
        for path in _walk(root):
            if any(path.resolve().is_relative_to(folder) for folder in allowed):
                found.setdefault(f"{kind}/{path.relative_to(root).as_posix()}", path)
            else:
                _warn_of_link(path)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Model folders, links to folders and weight files below `folder`. Links are never searched, nor is the cache."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:  # most folders that are registered do not exist
        log.debug("%s is not listed: %s", folder, error)
        return
    for path in entries:
        if path.is_dir():
            if path.is_symlink() or _is_model_folder(path):
                yield path
            elif path != host.cache_folder():
                yield from _walk(path)
        elif path.suffix.lower() in WEIGHTS:
            yield path


@cache
def _warn_of_link(path: Path) -> None:
    """Once for each link, however often the host asks for the list."""
    log.warning(
        "%s leads out of ComfyUI's model folders and is not listed; name its folder in extra_model_paths.yaml instead.",
        path,
    )
