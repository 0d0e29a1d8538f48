"""The engines that are loaded, by content: one for the same weights, however many loader nodes ask for it.

Nodes get an engine through `acquire` each time they run, so it does not matter whether the host dropped a loader's
output, moved the weights away or never ran the loader again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import host
from .types import Model

if TYPE_CHECKING:
    import torch

    from ..vortex_core import Engine

log = logging.getLogger(__name__)

BUNDLED = "tiny-schnell"
KEPT = 2  # engines; one that is offloaded still takes its weights' size of host memory


@dataclass(slots=True)
class Loaded:
    """An engine, what stands for it in the host, and what it may take."""

    engine: Engine
    patcher: Any
    budget: int


_loaded: OrderedDict[tuple[str, str], Loaded] = OrderedDict()  # least recently used first
_lock = threading.RLock()


def available() -> list[str]:
    """Names of the models that are found, the bundled miniature first."""
    return [BUNDLED, *host.model_folders()]


def find(name: str, vram_budget: float, mode: str) -> Model:
    """The handle of a model in `available`. Raises `VortexInputError` for any other name."""
    from ..vortex_core.checkpoint.bundle import TINY
    from ..vortex_core.errors import VortexInputError

    folders = {BUNDLED: TINY, **host.model_folders()}
    if name not in folders:
        raise VortexInputError(
            f"There is no model {name!r} here. Found: {', '.join(folders)}. Put a FLUX.1-schnell folder in the "
            "diffusers layout into models/vortex or models/diffusers and press R to refresh the list."
        )
    folder = folders[name]
    path = "tiny" if name == BUNDLED else str(folder)
    return Model(name, path, fingerprint(folder), vram_budget, mode)


def fingerprint(folder: Path) -> str:
    """Changes when a file of the model does: names, sizes and times, since 34 GB take too long to read.

    Raises `VortexCheckpointError` for a file that a link leads out of the folder.
    """
    from ..vortex_core.errors import VortexCheckpointError

    root = folder.resolve()
    digest = hashlib.sha256(str(root).encode(errors="surrogateescape"))
    for path in sorted(Path(base, file) for base, _, files in os.walk(root) for file in files):
        if not path.resolve().is_relative_to(root):
            raise VortexCheckpointError(
                f"{path} is a link that leads out of its model folder, and is not followed. Put the file itself there.",
                path=str(path),
            )
        stat = path.stat()
        digest.update(
            f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()[:16]


def acquire(model: Model) -> Engine:
    """The engine of a handle, resident, with the room its budget promises; loaded first where it is not."""
    with _lock:
        loaded = _loaded.pop(model.key, None)
        if loaded is None:
            loaded = _load(model)
        if loaded.budget != model.budget:
            loaded.engine.limit(model.vram_budget)
            loaded.budget = model.budget
        _loaded[model.key] = loaded
        _offload_others(model, loaded.engine.device)
        host.bring_back(loaded.patcher, max(0, loaded.budget - loaded.engine.device_bytes))
        return loaded.engine


def _load(model: Model) -> Loaded:
    import torch

    from ..vortex_core import Engine
    from ..vortex_core.errors import VortexInitializationError

    device = host.device()
    check_budget(model, device)
    while len(_loaded) >= KEPT:
        _unload(next(iter(_loaded)))
    _offload_others(model, device)
    host.make_room(model.budget, device)
    report = host.progress(1000)  # bytes overflow the 32 bits that some of the host's clients count in
    log.info("Loading %s", model.name)
    try:
        engine = Engine.load(
            model.path,
            device=device,
            vram_budget=None if device.type == "cpu" else model.vram_budget,
            on_progress=lambda done, all: report(1000 * done // all),
        )
    except VortexInitializationError as error:
        # as torch's own error, so that the host unloads its models and says so
        raise torch.OutOfMemoryError(str(error)) from error
    return Loaded(engine, host.register(engine), model.budget)


def check_budget(model: Model, device: torch.device) -> None:
    """Raise `VortexInputError`, before other models make room, for a budget that the card cannot keep."""
    import torch

    from ..vortex_core import loading

    if device.type != "cpu":
        loading.check_budget(model.vram_budget, torch.cuda.mem_get_info(device)[1])


def _offload_others(model: Model, device: torch.device) -> None:
    """Least recently used engines leave the card until the budgets of those that stay fit on it."""
    import torch

    if device.type == "cpu":
        return
    free = torch.cuda.mem_get_info(device)[1] - model.budget
    for key, other in reversed(_loaded.items()):
        if key == model.key or not other.engine.resident:
            continue
        free -= other.budget
        if free < 0:
            log.info("%s leaves the card: its budget does not fit beside that of %s", other.engine.name, model.name)
            other.engine.offload()


def _unload(key: tuple[str, str]) -> None:
    loaded = _loaded.pop(key)
    log.info("%s is unloaded: Vortex keeps %d models", loaded.engine.name, KEPT)
    loaded.patcher.detach()
    loaded.engine.unload()
