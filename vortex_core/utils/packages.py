"""Packages that Vortex can do without: whether they import here. A broken package counts as missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ..errors import SHOWN, VortexError

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
    """Raise `VortexError` where `module` does not import. To be called before work that would fail there."""
    why = missing(module)
    if why is not None:
        package = module.partition(".")[0]
        raise VortexError(f"{purpose} needs the package {package}, which {why}. Try `pip install --upgrade {package}`.")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; its class where it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:SHOWN]
