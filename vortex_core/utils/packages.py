"""Packages that may be missing: whether they import here, and what to do if not. A broken one counts as missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec

from ..errors import SHOWN, VortexError

EXTRAS = {"gguf": "gguf", "matplotlib": "plots", "scipy": "stats"}  # by package, as in pyproject.toml
TRITON = {6: 2, 7: 3, 8: 4, 9: 5, 10: 6, 11: 6, 12: 7, 13: 7}  # 3.x, by torch 2.x: what torch asks for on Linux
PACKAGES = {"PIL": "pillow", "pynvml": "nvidia-ml-py"}  # by module, where the names differ

# Why modules do not import, until the process ends. A second try would take as long, and may fail in another way.
_broken: dict[str, str] = {}


def missing(module: str) -> str | None:
    """Import `module`. Returns None, or why it failed: `does not import (...)`. A broken one may raise anything."""
    if module in _broken and sys.modules.get(module) is None:
        return _broken[module]
    try:
        with _nothing_fetched():
            import_module(module)
    except (Exception, SystemExit) as error:
        _broken[module] = f"does not import ({first_line(error)})"
        return _broken[module]
    return None


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Inside, the package `kernels` does not import: bitsandbytes would have it download code, and run that."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def need(module: str, purpose: str) -> None:
    """Raise `VortexError` where `module` does not import. Call it before the work that needs it starts."""
    why = missing(module)
    if why is not None:
        raise VortexError(f"{purpose} needs the package {_package(module)}, which {why}. Try `{remedy(module)}`.")


def remedy(module: str) -> str:
    """The command to try where `module` does not import. It names Vortex's extra only where Vortex is installed.

    In ComfyUI it is not: there the folder itself is loaded.
    """
    top, package = module.partition(".")[0], _package(module)
    if package == "triton" and sys.platform == "win32":
        return f'pip install -U "{_triton_windows()}"'
    if sys.modules.get(top) is not None or find_spec(top) is not None:
        return f"pip install --upgrade {package}"  # it is there, but broken or too old
    if package in EXTRAS and _is_installed():
        return f"pip install 'vortex-flux[{EXTRAS[package]}]'"
    return f"pip install {package}"


def _triton_windows() -> str:
    """The package on Windows, with the bound that suits this torch: a later Triton may not work with it."""
    try:
        major, minor = (int(part) for part in metadata.version("torch").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return "triton-windows"
    suits = TRITON.get(minor) if major == 2 else None
    return "triton-windows" if suits is None else f"triton-windows<3.{suits + 1}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; its class where it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:SHOWN]


def _package(module: str) -> str:
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def _is_installed() -> bool:
    try:
        return bool(metadata.version("vortex-flux"))
    except Exception:  # no metadata, or half of it
        return False
