"""`vortex bench compare` on the miniature: every contender that runs on a CPU, drawing the same picture."""

import json
import subprocess
import sys
from pathlib import Path

import comfy_host
import pytest
from typer.testing import CliRunner

from vortex_core.bench.contest import card
from vortex_core.cli.bench import app
from vortex_core.flux1.spec import FluxSpec

NAMES = ["diffusers, 16 bits", "Vortex exact", "diffusers, bitsandbytes NF4"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_contenders_draw_the_same_picture(tiny_dir: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_dir), "--device", "cpu", "--size", "64x64", "--samples", "2", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["compare", *options])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["declined"] == {"Vortex fast": "not on this device"}
    rows = {row["contender"]: row for row in printed["rows"]}
    assert list(rows) == NAMES
    assert all(row["picture"]["count"] == 2 and row["step"]["count"] == 8 for row in rows.values())
    assert rows["diffusers, 16 bits"]["off"] == 0
    exact, peer = rows["Vortex exact"]["off"], rows["diffusers, bitsandbytes NF4"]["off"]
    assert 0 < exact == pytest.approx(peer, rel=0.1)  # the same NF4 weights
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == printed["rows"]
    assert (tmp_path / "compare.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "cpu"], "take 31 GB of VRAM, and there is no GPU here"),
        (["--model", "nowhere"], "nowhere is no folder in the diffusers layout"),
        (["--model", "tiny", "--size", "64"], "--size must look like 512x512"),
        (["--model", "tiny", "--size", "65x64"], "65"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_loaded(options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["compare", *options])
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.split())


CORE = """
import sys
tree, folder = sys.argv.pop(), sys.argv.pop()
sys.path.insert(0, tree)
import comfy.options
comfy.options.enable_args_parsing()  # for --cpu
import torch
from pathlib import Path
from types import SimpleNamespace
from diffusers import FluxTransformer2DModel
from vortex_core import sampling
from vortex_core.bench.peers import comfy_velocity

torch.manual_seed(0)
model = FluxTransformer2DModel.from_pretrained(folder).bfloat16()
with torch.inference_mode():
    ours = comfy_velocity(Path(tree), dict(model.config), model.state_dict(), torch.device("cpu"))
    shapes = (1, 256, model.config.joint_attention_dim), (1, model.config.pooled_projection_dim), (1, 64, 64)
    txt, pooled, img = (torch.randn(shape).bfloat16() for shape in shapes)
    t = torch.ones(1).bfloat16()
    ids = sampling.positions(128, 128, 256)
    theirs = model(img, txt, pooled, t, img_ids=ids[256:], txt_ids=ids[:256], return_dict=False)[0]
    found = ours(SimpleNamespace(height=128, width=128, txt=txt, pooled=pooled), img, t)
print(float((found - theirs).norm() / theirs.norm()))
"""


@pytest.mark.comfyui
@pytest.mark.parametrize("tree", comfy_host.trees(), ids=lambda tree: tree.name)
def test_comfyui_core_computes_what_diffusers_does(tree: Path, tiny_dir: Path) -> None:
    """Its class wants to be told other things from version to version."""
    command = [sys.executable, "-c", CORE, "--cpu", str(tiny_dir / "transformer"), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if "No module named" in result.stderr and result.returncode:
        pytest.skip(f"NOT RUN, ComfyUI's core: its packages are not installed here; {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) < 0.03  # in bf16


def test_the_card_counts_what_a_step_takes() -> None:
    """17.7 and 69.5 TFLOP a step, 8.61 B parameters."""
    small, large = card(FluxSpec(), 512, 512), card(FluxSpec(), 1024, 1024)
    assert small["step_flops"] == pytest.approx(17.7e12, rel=0.02)
    assert large["step_flops"] == pytest.approx(69.5e12, rel=0.02)
    assert small["bf16_bytes"] == pytest.approx(2 * 8.61e9, rel=0.01)
