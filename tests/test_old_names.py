"""Modules under the names that they had before 0.2.0."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import vortex_core
from vortex_core.old_names import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_is_the_module_of_the_new_one(old: str) -> None:
    new = importlib.import_module(f"vortex_core.{MOVED[old]}")
    assert importlib.import_module(f"vortex_core.{old}") is new
    assert new.__spec__ is not None
    assert new.__spec__.name == f"vortex_core.{MOVED[old]}"


def test_packages_have_what_the_modules_of_their_names_had() -> None:
    from vortex_core.cli import app
    from vortex_core.device import resolve_device
    from vortex_core.memory import MemoryManager

    assert (callable(app), resolve_device("cpu").type, MemoryManager.__name__) == (True, "cpu", "MemoryManager")
    with pytest.raises(ImportError, match="nothing_of_this_name"):
        importlib.import_module("vortex_core.nothing_of_this_name")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        importlib.import_module("vortex_core.memory").nothing_of_this_name  # noqa: B018


def test_names_that_people_wrote_work_in_a_fresh_process() -> None:
    script = "from vortex_core import latency, vram; from vortex_core.vram import snapshot; print(snapshot.__module__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "vortex_core.device.vram\n"
    assert vortex_core.__version__ == "0.2.0"
