"""`vortex inspect` of a LoRA: words, figures, JSON, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lora_parts
import pytest
import torch
from lora_parts import random
from typer.testing import CliRunner

from vortex_core.checkpoint.key_maps import modulation_shapes, step_shapes
from vortex_core.checkpoint.lora_header import open_lora
from vortex_core.checkpoint.lora_kinds import kind_of
from vortex_core.cli.lora_inspection import WHOLE, _bundled, inspect_lora
from vortex_core.cli.main import app
from vortex_core.errors import VortexCheckpointError
from vortex_core.flux1.spec import ModelSpec


def released(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A kohya LoRA of rank 1 of all of FLUX.1, and oddities in every other part."""
    flux = ModelSpec().flux
    state = {}
    for name, shape in (step_shapes(flux) | modulation_shapes(flux)).items():
        if len(shape) == 2:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            state |= {f"{key}.lora_up.weight": random(shape[0], 1), f"{key}.lora_down.weight": random(1, shape[1])}
    key = "lora_unet_single_blocks_0_linear1"
    state |= {f"{key}.diff_b": random(21504), "lora_unet_guidance_in_in_layer.alpha": torch.tensor(1.0)}
    del state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
    state |= lora_parts.loha(key, 21504, 3072, 40) | lora_parts.lora(
        "lora_te1_text_model_encoder_layers_3_mlp_fc1", 3072, 768, 4
    )
    state |= {"lora_te3_encoder_block_0_layer_1_layer_norm.w_norm": random(4096), "bundle_emb.x.t5": random(2, 4096)}
    return lora_parts.save(path, state, metadata)


def test_figures(tmp_path: Path) -> None:
    seen = inspect_lora(released(tmp_path / "a.safetensors", {"ss_sd_model_name": "flux1-schnell.safetensors"}))
    assert seen is not None
    assert (seen.kind, seen.base, seen.fits) == ("kohya names, LoRA, LoHa, a norm", "FLUX.1-schnell", "FLUX.1")
    assert seen.ranks == (1, 4, 40)
    transformer, t5, clip = seen.found
    assert (transformer.matrices, transformer.updates, transformer.whole, transformer.biases) == (312, 311, 1, 1)
    assert transformer.prompt_time == 4 + 2 * 19 + 38 + 1
    assert (clip.part, clip.matrices, clip.prompt_time) == ("clip", 1, 1)
    assert (t5.part, t5.matrices, t5.norms) == ("t5", 0, 1)
    flux = ModelSpec().flux
    shapes = [shape for shape in (step_shapes(flux) | modulation_shapes(flux)).values() if len(shape) == 2]
    rank_1 = sum(n + k for n, k in shapes) - 21504 - 3072
    assert seen.factors == 2 * (rank_1 + 4 * (3072 + 768))
    assert seen.refused == {"it is a learned embedding, which Vortex does not apply": 1, WHOLE: 1}
    assert list(seen.ignored.values()) == [1]
    assert sum(one.nbytes for one in seen.found) < seen.nbytes


def test_words(tmp_path: Path) -> None:
    path = released(tmp_path / "a.safetensors", {"software": '{"name": "ai-toolkit"}'})
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    for words in (
        "LoRA: kohya names, LoRA, LoHa, a norm, by ai-toolkit; rank 1, 4, 40;",
        "It fits FLUX.1-schnell and FLUX.1-dev, which have the same sizes; trained on FLUX.1-dev",
        "MB of updates on the GPU, in 16 bits",
        "refused: it is a learned embedding, which Vortex does not apply (1 in the file)",
        "refused: it changes a 4-bit weight as a whole",
        "no effect: it acts on FLUX.1-dev's guidance",
    ):
        assert words in shown.output, shown.output


def test_json(tmp_path: Path) -> None:
    path = released(tmp_path / "a.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    lora = json.loads(shown.output)["lora"]
    assert lora["path"] == str(path)
    assert lora["ranks"] == [1, 4, 40]
    assert [one["part"] for one in lora["found"]] == ["transformer", "t5", "clip"]


def test_a_lora_of_the_bundled_model(tmp_path: Path) -> None:
    width = _bundled().flux.hidden
    state = lora_parts.lora("transformer.transformer_blocks.1.attn.to_q", width, width, 8)
    seen = inspect_lora(lora_parts.save(tmp_path / "a.safetensors", state))
    assert seen is not None
    assert seen.fits == "tiny-schnell"
    assert seen.ranks == (8,)


def test_a_stranger_is_named_for_the_released_model(tmp_path: Path) -> None:
    state = lora_parts.lora("lora_unet_double_blocks_0_img_attn_proj", 1000, 1000, 4)
    with pytest.raises(VortexCheckpointError, match="1000 x 1000 in it and 3072 x 3072 here"):
        inspect_lora(lora_parts.save(tmp_path / "a.safetensors", state))


def test_models_are_looked_at_as_before(tmp_path: Path, tiny_dir: Path) -> None:
    assert inspect_lora(tiny_dir) is None
    assert inspect_lora(tmp_path / "absent.safetensors") is None
    assert inspect_lora(tiny_dir / "transformer" / "diffusion_pytorch_model.safetensors") is None


def test_looking_does_not_import_torch(tmp_path: Path) -> None:
    path = released(tmp_path / "a.safetensors")
    code = "import sys; from vortex_core.cli.main import run; sys.argv = ['vortex', 'inspect', sys.argv[1]]; run(); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)


WRITTEN = {
    "kohya": "kohya names, LoRA",
    "kohya, diffusers names": "kohya with diffusers' names, LoRA",
    "diffusers": "diffusers names, LoRA",
    "PEFT": "PEFT names, LoRA",
    "BFL": "BFL names, LoRA",
    "ComfyUI": "ComfyUI names, LoRA",
    "OneTrainer": "OneTrainer names, LoRA",
    "LyCORIS": "LyCORIS (SimpleTuner) names, LoRA",
    "bare diffusers": "bare diffusers names, LoRA",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_formats_are_named(tmp_path: Path, name: str) -> None:
    state = lora_parts.WRITERS[name](lora_parts.factors(2))
    assert kind_of(open_lora(lora_parts.save(tmp_path / "a.safetensors", state), lora_parts.MINI)) == WRITTEN[name]
