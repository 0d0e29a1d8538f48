"""Vortex: FLUX.1-schnell pictures with resident NF4 weights.

    from vortex_core import load_flux_schnell
    engine = load_flux_schnell("tiny")
    picture = engine.generate("a red circle on a white background", seed=7)

Public names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .old_names import install

if TYPE_CHECKING:
    from .device.vram import clear_cuda_cache as clear_cuda_cache
    from .flux1.conditioning import Conditioning as Conditioning
    from .runtime.engine import Engine as Engine
    from .runtime.engine import load_flux_schnell as load_flux_schnell

__version__ = "0.2.0"

install(__name__)

_HOMES = {
    "Conditioning": "flux1.conditioning",
    "Engine": "runtime.engine",
    "load_flux_schnell": "runtime.engine",
    "clear_cuda_cache": "device.vram",
    **{name: "errors" for name in vars(errors) if name.endswith(("Error", "Warning"))},
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
