"""The machine code of the kernels in CUDA C, for cards that are not here: what it takes of a multiprocessor.

NVRTC compiles without a GPU. torch for the CPU has none; `pip install nvidia-cuda-nvrtc` brings it for this test.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vortex_core.kernels import nvrtc

SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}  # KiB that a block can have
KERNELS = {
    "step": {"modulate", "decode", "guide"},
    "eight": {"product_128", "decode_fp8"},
} | {variant: {"weights"} for variant in nvrtc.VARIANTS}
USAGE = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@pytest.fixture(scope="module")
def usage_tool() -> str:
    triton = find_spec("triton")
    tools = [
        Path(folder) / "backends/nvidia/bin/cuobjdump"
        for folder in (triton and triton.submodule_search_locations) or ()
    ]
    found = next((str(tool) for tool in tools if tool.exists()), None)
    if found is None:
        pytest.skip("NOT RUN, what kernels take of a card: Triton's cuobjdump is not here")
    return found


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC, of torch's own CUDA or of NVIDIA's package."""
    try:
        nvrtc.load()
        return
    except OSError:
        package = find_spec("nvidia")
        folders = [Path(folder) for folder in (package and package.submodule_search_locations) or ()]
        files = [file for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*") if "alt" not in file.name]
        if not files:
            pytest.skip("NOT RUN, the code of the kernels in CUDA C: there is no NVRTC here")
    library = ctypes.CDLL(str(files[0]))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    monkeypatch.setattr(nvrtc, "load", lambda: library)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("module", nvrtc.MODULES)
def test_nothing_spills_and_blocks_fit(arch: str, module: str, usage_tool: str, tmp_path: Path) -> None:
    code = tmp_path / "code.cubin"
    code.write_bytes(nvrtc.compiled(nvrtc.source(torch.bfloat16, module), arch))
    told = subprocess.run([usage_tool, "-res-usage", str(code)], capture_output=True, text=True, check=True).stdout
    found = {name: tuple(map(int, numbers)) for name, *numbers in USAGE.findall(told)}
    assert set(found) >= KERNELS[module]
    for name, (registers, stack, shared, local) in found.items():
        assert (stack, local) == (0, 0), name
        assert registers <= 255
        blocks = {"step": 1, "eight": 2}.get(module, 4)  # at once
        assert blocks * max(shared, 1024) <= (SHARED[arch] + 1) * 1024, name
