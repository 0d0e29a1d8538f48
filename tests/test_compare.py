"""`vortex bench compare` on the miniature: every contender that runs on a CPU, drawing the same picture."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vortex_core.bench.command import app
from vortex_core.bench.compare import card
from vortex_core.spec import FluxSpec

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
        (["--device", "cpu"], "take 30 GB of VRAM, and there is no GPU here"),
        (["--model", "nowhere"], "nowhere is no folder in the diffusers layout"),
        (["--model", "tiny", "--size", "64"], "--size must look like 512x512"),
        (["--model", "tiny", "--size", "65x64"], "65"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_loaded(options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["compare", *options])
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.split())


def test_the_card_counts_what_a_step_takes() -> None:
    """17.7 and 69.5 TFLOP a step, 8.61 B parameters."""
    small, large = card(FluxSpec(), 512, 512), card(FluxSpec(), 1024, 1024)
    assert small["step_flops"] == pytest.approx(17.7e12, rel=0.02)
    assert large["step_flops"] == pytest.approx(69.5e12, rel=0.02)
    assert small["bf16_bytes"] == pytest.approx(2 * 8.61e9, rel=0.01)
