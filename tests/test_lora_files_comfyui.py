"""The same files through ComfyUI's own loader give the same weights, but where it is known to compute otherwise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import comfy_host
import lora_parts
import pytest
import torch
from lora_parts import LINEARS, MINI, MLP, PROJ, SQUARE, WRITERS, D, M, factors, random
from safetensors.torch import load_file, save_file
from torch import Tensor

from vortex_core.checkpoint.lora_reader import read_lora

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
STRENGTH = 0.75
LATER = ("DiffSynth", "bare diffusers")  # names that ComfyUI knows since 0.11
# names of which it loads nothing for FLUX, or a part
UNKNOWN = ("kohya, diffusers names", "PEFT", "PEFT, as it trains", "fal", "BFL", "old diffusers")
PARTLY = ("old processors",)


def flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def methods() -> dict[str, dict[str, Tensor]]:
    """A file for each method."""
    norms = {f"double_blocks.{i}.{stream}_attn.norm.query_norm.scale" for i in range(2) for stream in ("img", "txt")}
    control = WRITERS["BFL"](factors(3)) | {f"{name}.lora_B.bias": random(n) for name, (n, _, _) in LINEARS.items()}
    columns = {f"{flat(MLP)}.dora_scale": random(1, D, by=1).abs() + 1}
    return {
        "loha": lora_parts.loha(flat(MLP), M, D, 3) | lora_parts.loha(flat(PROJ), D, D, 20),
        "lokr": lora_parts.lokr(flat(PROJ), (8, 8), (16, 16), (None, 2))
        | lora_parts.lokr(flat(SQUARE), (8, 8), (16, 16), (None, None))
        | lora_parts.lokr(flat(MLP), (16, 8), (32, 16), (2, 3)),
        "glora": lora_parts.glora(flat(MLP), M, D, 4) | lora_parts.glora(flat(PROJ), D, D, 4),
        "old glora": lora_parts.glora(flat(MLP), M, D, 4, old=True),
        "dora of columns": lora_parts.lora(flat(MLP), M, D, 4) | columns,
        "whole": {f"{flat(PROJ)}.diff": random(D, D), f"{flat(PROJ)}.diff_b": random(D)},
        "norms": {f"diffusion_model.{name.removesuffix('.scale')}.diff": random(D) for name in norms},
        "control": {f"diffusion_model.{key.replace('.lora_B.bias', '.diff_b')}": each for key, each in control.items()},
    }


def by_comfyui(tree: Path, folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    weights = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in lora_parts.weights().items()}
    save_file(weights, folder / "weights.safetensors")
    for name, state in files.items():
        lora_parts.save(folder / f"{name}.lora.safetensors", state)
    script = Path(__file__).with_name("lora_by_comfyui.py")
    subprocess.run(
        [comfy_host.python(tree), str(script), str(folder), str(STRENGTH)],
        env=os.environ | {"PYTHONPATH": str(tree)}, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    return {name: load_file(folder / f"{name}.out.safetensors") for name in files}


def ours(path: Path) -> dict[str, Tensor]:
    """W + s * D of everything that the file changes."""
    (part,) = read_lora(path, MINI).parts.values()
    weights = lora_parts.weights()
    made = {
        f"{name}.weight": weights[f"{name}.weight"] + STRENGTH * part.delta(name, weights[f"{name}.weight"])
        for name in part.modules()
    }
    made |= {f"{name}.bias": weights[f"{name}.bias"] + STRENGTH * bias for name, bias in part.biases.items()}
    for name, norm in part.norms.items():
        scale = weights[f"{name}.scale"]
        made[f"{name}.weight"] = scale + STRENGTH * norm.delta(scale)
    return made


@pytest.mark.parametrize("tree", comfy_host.trees(), ids=lambda tree: tree.name)
def test_comfyuis_own_loader(tmp_path: Path, tree: Path) -> None:
    files = {name: write(factors(5)) for name, write in WRITERS.items() if name not in PARTLY} | methods()
    theirs = by_comfyui(tree, tmp_path, files)
    for name, expected in theirs.items():
        found = ours(tmp_path / f"{name}.lora.safetensors")
        assert expected.keys() == (set() if name in UNKNOWN or (name in LATER and not expected) else found.keys()), name
        for key, weight in expected.items():
            torch.testing.assert_close(
                found[key], weight, atol=1e-4, rtol=1e-4, msg=lambda text, where=(name, key): f"{where}: {text}"
            )
