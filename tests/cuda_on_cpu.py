"""Kernels in CUDA C on the CPU, by a C++ compiler and cuda_on_cpu.h: what is checked is everything but the card."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from vortex_core.kernels import compiled, compiled8, nvrtc, weights

COMPILER = shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([\w, ]+\) )?(\w+)\(\s*(.*?)\)\s*\{', re.DOTALL)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, have all modules launch here; skip the test where that cannot be. On a card, leave them alone."""
    if torch.cuda.is_available():
        return
    if COMPILER is None:
        pytest.skip("NOT RUN, the kernels in CUDA C: there is no C++ compiler here")
    for module in (compiled, compiled8, weights):
        monkeypatch.setattr(module, "launch", launch)


@cache
def kernels_of(dtype: torch.dtype, module: str) -> tuple[Any, dict[str, list[str]]]:
    """The library, and the types of each kernel's parameters."""
    text = nvrtc.source(dtype, module)
    signatures = {
        name: [re.sub(r"\w+$", "", part.strip()).strip() for part in parameters.replace("__restrict__", "").split(",")]
        for name, parameters in KERNEL.findall(text)
    }
    entries = [
        f'extern "C" void run_{name}(int columns, int rows, int count, void **given)\n'
        "{ launch(columns, rows, count, [=] { "
        f"{name}({', '.join(f'*({kind} *)given[{i}]' for i, kind in enumerate(kinds))}); }}); }}"
        for name, kinds in signatures.items()
    ]
    folder = Path(mkdtemp())
    (folder / "all.cpp").write_text("\n".join(['#include "cuda_on_cpu.h"', text, *entries]))
    command = [COMPILER or "g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-I", str(Path(__file__).parent)]
    subprocess.run([*command, "-o", str(folder / "all.so"), str(folder / "all.cpp")], check=True)
    library = ctypes.CDLL(str(folder / "all.so"))
    shutil.rmtree(folder)
    return library, signatures


def launch(
    name: str,
    grid: tuple[int, int],
    threads: int,
    device: torch.device,
    dtype: torch.dtype,
    *arguments: Any,
    module: str = "step",
    early: bool = False,
    shared: int = 0,
) -> None:
    """In place of `nvrtc.launch`."""
    library, signatures = kernels_of(dtype, module)
    kinds, values = signatures[name], [nvrtc._c(argument) for argument in arguments]
    whole = dict.fromkeys(("int", "unsigned"), ctypes.c_int)
    sizes = {"*": ctypes.c_void_p, **whole, "long long": ctypes.c_longlong, "float": ctypes.c_float}
    wanted = [sizes["*" if kind.endswith("*") else kind] for kind in kinds]
    assert [type(value) for value in values] == wanted, name  # a card would read other bytes
    given = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    assert threads % 32 == 0
    getattr(library, f"run_{name}")(*grid, threads, given)
