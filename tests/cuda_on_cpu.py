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

import torch

from vortex_core.kernels import nvrtc

COMPILER = shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([\w, ]+\) )?(\w+)\(\s*(.*?)\)\s*\{', re.DOTALL)


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
) -> None:
    """In place of `nvrtc.launch`."""
    library, signatures = kernels_of(dtype, module)
    kinds, values = signatures[name], [nvrtc._c(argument) for argument in arguments]
    sizes = {"*": ctypes.c_void_p, "int": ctypes.c_int, "long long": ctypes.c_longlong, "float": ctypes.c_float}
    wanted = [sizes["*" if kind.endswith("*") else kind] for kind in kinds]
    assert [type(value) for value in values] == wanted, name  # a card would read other bytes
    given = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    assert threads % 32 == 0
    getattr(library, f"run_{name}")(*grid, threads, given)
