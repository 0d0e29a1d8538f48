"""Packages that Vortex can do without: whether they import here. A broken one counts as a missing one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ..errors import SHOWN, VortexError

_broken: dict[str, str] = {}  # to try again takes as long, and may say something else the second time


def missing(module: str) -> str | None:
    """Why `module` cannot be used: `does not import (...)`, or None once it has. A broken one may raise anything."""
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
    """Inside, the package `kernels` does not import: bitsandbytes has it download code, and runs that, where it can."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def need(module: str, purpose: str) -> None:
    """Raise `VortexError` where `module` does not import, before work is done that would end there."""
    why = missing(module)
    if why is not None:
        package = module.partition(".")[0]
        raise VortexError(f"{purpose} needs the package {package}, which {why}. Try `pip install --upgrade {package}`.")


def first_line(error: BaseException) -> str:
    """What an error says in its first line, at most 200 characters, or its kind where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:SHOWN]
