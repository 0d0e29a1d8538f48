"""tools/benchmarks/comfyui_int8.py: what it concludes, and a rehearsal with ComfyUI's own quantized linears."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import comfy_host
import pytest
from comfyui_int8 import peer, promises, ratios

from vortex_core.bench.contest import Result, Row
from vortex_core.utils.timing import summarize

ROOT = Path(__file__).parents[1]

# The tree's packages come last: what this environment has, it keeps.
RUN = """
import runpy, sys
sys.path.append(sys.argv.pop(1))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def row(contender: str, side: int, ms: float) -> Row:
    step = summarize([ms / 1e3] * 3)
    return Row(contender, side, side, step, step, step, 0, 0.0)


def test_the_promise_is_held_against_the_fastest_8_bit_peer() -> None:
    result = Result({}, {})
    for side, times in {512: (20.0, 48.0, 32.0), 1024: (100.0, 149.0, 180.0)}.items():
        ours, int8, w4a8 = times
        result.rows += [row("Vortex int8", side, ours), row(peer("int8"), side, int8), row(peer("w4a8"), side, w4a8)]
        result.rows += [row("Vortex exact", side, 1.0), row(peer("bf16"), side, 1.0)]
    small, large = promises(ratios(result), [512, 1024, 256])
    assert (small["side"], small["ratio"], small["holds"]) == (512, pytest.approx(1.6), True)
    assert (large["side"], large["ratio"], large["holds"]) == (1024, pytest.approx(1.49), False)
    assert small["peers"] == [peer("int8"), peer("w4a8")]


def test_what_was_not_measured_holds_no_promise() -> None:
    result = Result({}, {}, [row("Vortex int8", 512, 1.0), row(peer("bf16"), 512, 9.0), row(peer("int8"), 1024, 9.0)])
    assert [row["holds"] for row in promises(ratios(result), [512, 1024])] == [False, False]


@pytest.mark.slow
@pytest.mark.comfyui
@pytest.mark.parametrize("tree", comfy_host.trees(), ids=lambda tree: tree.name)
def test_the_peers_compute_what_the_core_does_in_16_bits(tree: Path) -> None:
    formats = tree / "comfy" / "quant_ops.py"
    if not formats.exists() or "asym_w4a8_int8" not in formats.read_text():
        pytest.skip("this ComfyUI knows no W4A8")
    purelib = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.check_output([comfy_host.python(tree), "-c", purelib], text=True).strip()
    tool = ROOT / "tools" / "benchmarks" / "comfyui_int8.py"
    options = ["--comfyui", str(tree), "--tiny", "--samples", "4", "--mode", "exact", "--modulation"]
    command = [sys.executable, "-c", RUN, packages, str(tool), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if "No module named" in result.stderr and result.returncode:
        pytest.skip(f"NOT RUN, the peers: a package is not installed here; {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    off = {name: error for name, _, _, _, error in json.loads(result.stdout.splitlines()[-1])["steps"]}
    assert off.pop(peer("bf16")) == 0
    assert 0 < off[peer("int8")] < 0.05
    assert off[peer("int8")] < off[peer("w4a8")] < 0.3
    assert off[peer("w4a8")] < off[peer("w4a8-64")] < 0.5
    assert 0.1 < off["Vortex exact"] < 0.4  # NF4's own distance
