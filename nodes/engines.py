"""The loaded engines, by content: loader nodes that name the same weights share one engine.

Nodes call `acquire` each time they run. So it does not matter if the host dropped a loader's output, moved the weights
away or never ran the loader again.
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
from weakref import WeakValueDictionary

from . import host
from .types import Model

if TYPE_CHECKING:
    import torch

    from ..vortex_core import Engine

log = logging.getLogger(__name__)

KEPT = 2  # engines; an offloaded one still takes as much host memory as its weights have bytes


@dataclass(slots=True)
class Loaded:
    """An engine, its stand-in in the host's list of models, and its budget in bytes."""

    engine: Engine
    patcher: Any
    budget: int


_loaded: OrderedDict[tuple[str, str], Loaded] = OrderedDict()  # least recently used first
_models: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()  # the host's, while a MODEL has them
_lock = threading.RLock()


def acquire(model: Model) -> Engine:
    """The engine of a handle: loaded if it was not, resident, and with the VRAM free that its budget promises."""
    with _lock:
        loaded = _used(model)
        # while a clone is sampled with, its patches stay where they are
        patcher = getattr(loaded.patcher.model, "current_patcher", None) or loaded.patcher
        host.bring_back(patcher, max(0, loaded.budget - loaded.engine.device_bytes))
        return loaded.engine


def renew(model: Model) -> None:
    """Load the engine of a handle, if it was not, while the host makes it resident by itself."""
    with _lock:
        _used(model)


def native(model: Model) -> Any:
    """The MODEL of a handle, for the host's nodes; None where the host's Flux is not what Vortex knows.

    Its engine is made resident, as by `acquire`.
    """
    from .native_model import is_native

    found = patcher(model)
    if not is_native(found.model):
        return None
    made = found.clone()
    made.handle = model
    return made


def native_clip(model: Model) -> Any:
    """The CLIP of a handle, for the host's nodes; None where the host's text encoders are not what Vortex knows."""
    from .native_clip import clip_of

    return clip_of(patcher(model), model)


def patcher(model: Model) -> Any:
    """The stand-in, in the host's list of loaded models, for the engine of a handle. Loads it if it was not."""
    with _lock:
        acquire(model)
        return _loaded[model.key].patcher


def _used(model: Model) -> Loaded:
    """The engine of a handle, with its budget; others leave the card where the budgets do not fit."""
    loaded = _loaded.pop(model.key, None)
    if loaded is None:
        loaded = _load(model)
    if loaded.budget != model.budget:
        loaded.engine.limit(model.vram_budget)
        loaded.budget = model.budget
    _loaded[model.key] = loaded
    _offload_others(model, loaded.engine.device)
    return loaded


@contextmanager
def torchs_own_memory_errors() -> Iterator[None]:
    """Turn Vortex's errors of too little memory into torch's: the host then unloads its models and tells the user."""
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
    report = host.progress(1000)  # not bytes: some of the host's clients count in 32 bits
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
    patcher = host.register(engine, _models.get(model.key))
    _models[model.key] = patcher.model
    return Loaded(engine, patcher, model.budget)


def _device() -> torch.device:
    """The host's device. Raises `VortexDeviceError` if Vortex does not run on it."""
    from ..vortex_core.device.select import resolve_device
    from ..vortex_core.errors import VortexDeviceError

    try:
        return resolve_device(host.device())
    except VortexDeviceError as error:
        raise VortexDeviceError(f"{error} For ComfyUI that is the option --cpu.") from None


def check_budget(model: Model, device: torch.device) -> None:
    """Raise `VortexInputError` for a budget that the card does not have, before other models make room for it."""
    import torch

    from ..vortex_core.runtime import loading

    if device.type != "cpu":
        loading.check_budget(model.vram_budget, torch.cuda.mem_get_info(device)[1])


def _offload_others(model: Model, device: torch.device) -> None:
    """Offload the least recently used engines until the budgets of those that stay fit on the card."""
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
