"""Runs a benchmark under one of torch's allocators. A process chooses its allocator when it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from ..errors import VortexInputError

ALLOCATORS = ("native", "cudaMallocAsync")  # torch's own, and the driver's, which ComfyUI switches on


def ensure_allocator(name: str | None, command: Sequence[str]) -> None:
    """Return if torch's allocator is `name` or `name` is None. Else run `command` under it and exit with its code.

    Raises `VortexInputError` for an unknown name, or where there is no GPU.
    """
    if name is None:
        return
    if name not in ALLOCATORS:
        raise VortexInputError(f"Unknown allocator {name!r}; choose from {', '.join(ALLOCATORS)}.")
    if not torch.cuda.is_available():
        raise VortexInputError("An allocator can be chosen on a GPU only, and torch sees none.")
    if torch.cuda.get_allocator_backend() != name:
        raise SystemExit(subprocess.call(command, env=environment(name)))


def environment(name: str | None) -> dict[str, str]:
    """The environment for a process with this allocator."""
    chosen = {} if name is None else {"PYTORCH_CUDA_ALLOC_CONF": f"backend:{name}"}
    return {**os.environ, **chosen}


def again() -> list[str]:
    """The command line of the `vortex` command that runs now, to run it again."""
    return [sys.executable, "-m", "vortex_core", *sys.argv[1:]]
