"""The engines that are loaded, by content: one for the same weights, however many loader nodes ask for it.

Nodes get an engine through `acquire` each time they run, so it does not matter whether the host dropped a loader's
output, moved the weights away or never ran the loader again.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import host
from .types import Model

if TYPE_CHECKING:
    import torch

    from ..vortex_core import Engine

log = logging.getLogger(__name__)

KEPT = 2  # engines; one that is offloaded still takes its weights' size of host memory


@dataclass(slots=True)
class Loaded:
    """An engine, what stands for it in the host, and what it may take."""

    engine: Engine
    patcher: Any
    budget: int


_loaded: OrderedDict[tuple[str, str], Loaded] = OrderedDict()  # least recently used first
_lock = threading.RLock()


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


def patcher(model: Model) -> Any:
    """What stands in the host's list of loaded models for the engine of a handle, which is loaded where it is not."""
    with _lock:
        acquire(model)
        return _loaded[model.key].patcher


@contextmanager
def torchs_own_memory_errors() -> Iterator[None]:
    """Vortex's errors of too little memory as torch's own: the host then unloads its models and says so."""
    import torch

    from ..vortex_core.errors import MemoryPressureError, VortexInitializationError

    try:
        yield
    except (MemoryPressureError, VortexInitializationError) as error:
        raise torch.OutOfMemoryError(str(error)) from error


def _load(model: Model) -> Loaded:
    from ..vortex_core import Engine
    from ..vortex_core.checkpoint.tokenizer import has_tokenizers

    device = _device()
    check_budget(model, device)
    while len(_loaded) >= KEPT:
        _unload(next(iter(_loaded)))
    _offload_others(model, device)
    host.make_room(model.budget, device)
    report = host.progress(1000)  # bytes overflow the 32 bits that some of the host's clients count in
    log.info("Loading %s", model.name)
    with torchs_own_memory_errors():
        engine = Engine.load(
            model.path,
            **dict(model.parts),
            tokenizers=None if has_tokenizers(Path(model.path)) else host.tokenizers(),
            device=device,
            vram_budget=None if device.type == "cpu" else model.vram_budget,
            mode=model.mode,
            cache_dir=host.cache_dir(),
            on_progress=lambda done, all: report(1000 * done // all),
        )
    return Loaded(engine, host.register(engine), model.budget)


def _device() -> torch.device:
    """The host's device. Raises `VortexDeviceError` for one that Vortex does not run on."""
    from ..vortex_core.device.select import resolve_device
    from ..vortex_core.errors import VortexDeviceError

    try:
        return resolve_device(host.device())
    except VortexDeviceError as error:
        raise VortexDeviceError(f"{error} For ComfyUI that is the option --cpu.") from None


def check_budget(model: Model, device: torch.device) -> None:
    """Raise `VortexInputError`, before other models make room, for a budget that the card cannot keep."""
    import torch

    from ..vortex_core.runtime import loading

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
