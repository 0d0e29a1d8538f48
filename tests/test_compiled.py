"""Kernels as RTX 30, 40 and 50 get them: compiled here without a GPU, and run from their PTX where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "benchmarks" / "other_cards.py"
SHARED = 99 * 1024  # bytes of a program on 8.6, 8.9 and 12.0
# Bytes of a thread that its registers cannot hold: in the decoder alone, which runs once for a picture, and in
# attention in fp8, which no card but Hopper uses.
SPILLS = {"_convolve": 24, "_attend": 112}
OTHERS = {"_dequantize", "_multiply", "_rotate", "_modulate", "_gelu", "_guide", "_moments"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_kernels_fit_a_card_that_is_not_here(capability: int) -> None:
    pytest.importorskip("triton", reason="NOT RUN, the Triton kernels: Triton is not installed here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(TOOL), str(capability)]  # a process of its own: here Triton interprets
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    builds = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {build["kernel"] for build in builds} >= OTHERS | set(SPILLS)
    for build in builds:
        assert build["stack"] <= SPILLS.get(build["kernel"], 0), build
        assert capability == 80 or build["shared"] <= SHARED, build
