"""LoRA files in every trainer's words give the same canonical updates."""

from __future__ import annotations

import json
from pathlib import Path

import lora_parts
import pytest
import torch
from lora_parts import CLIP, LINEARS, MINI, T5, WRITERS, D, M, deltas, factors
from torch import Tensor

from vortex_core.checkpoint.lora_header import open_lora
from vortex_core.checkpoint.lora_reader import read_lora
from vortex_core.errors import VortexCheckpointError
from vortex_core.quant.adapters import LoraFile


def read(tmp_path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> LoraFile:
    return read_lora(lora_parts.save(tmp_path / "a.safetensors", state, metadata), MINI)


def changes(file: LoraFile, part: str = "transformer") -> dict[str, Tensor]:
    """D of every matrix, for a W of zeros."""
    found = file.parts[part]
    sizes = {"transformer": LINEARS, "clip": CLIP, "t5": T5}[part]
    return {name: found.delta(name, torch.zeros(sizes[name][:2])) for name in found.modules()}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_gives_the_same_matrices(tmp_path: Path, name: str) -> None:
    made = factors(rank=5)
    file = read(tmp_path, WRITERS[name](made))
    expected = deltas(made)
    found = changes(file)
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        assert torch.equal(found[module], delta), module
    assert not file.refused
    assert not file.ignored
    assert file.ranks == (5,)
    assert file.parts.keys() == {"transformer"}


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 16, 33, 64, 129, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ranks_and_types(tmp_path: Path, rank: int, dtype: torch.dtype) -> None:
    made = factors(rank, {"double_blocks.1.img_mlp.0": (M, D), "single_blocks.0.linear2": (D, D + M)})
    state = {key: tensor.to(dtype) for key, tensor in WRITERS["kohya"](made).items()}
    file = read(tmp_path, state)
    for module, delta in deltas(made).items():
        assert torch.equal(changes(file)[module], delta)
        (update,) = file.parts["transformer"].updates[module]
        assert update.rank == rank
        assert update.down.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_other_types_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    up = torch.tensor([[0.5, 1.0, -2.0, 0.25]]).expand(D, 4).contiguous()
    down = torch.tensor([[0.5], [1.0], [-2.0], [0.25]]).expand(4, D).contiguous()
    key = "double_blocks.0.img_attn.proj"
    file = read(tmp_path, {f"{key}.lora_B.weight": up.to(dtype), f"{key}.lora_A.weight": down.to(dtype)})
    assert torch.equal(changes(file)[key], up @ down)


def test_split_factors_that_differ_land_in_their_rows(tmp_path: Path) -> None:
    """Against a dense update in diffusers' layout, which a few lines here fuse."""
    dice = torch.Generator().manual_seed(1)
    block = "transformer.single_transformer_blocks.1"
    ranks = {"attn.to_q": (D, 3), "attn.to_v": (D, 1), "proj_mlp": (M, 8)}
    state, dense = {}, {}
    for name, (rows, rank) in ranks.items():
        up, down = torch.randn(rows, rank, generator=dice), torch.randn(rank, D, generator=dice)
        state |= {f"{block}.{name}.lora_B.weight": up, f"{block}.{name}.lora_A.weight": down}
        dense[name] = up @ down
    file = read(tmp_path, state)
    expected = torch.cat([dense["attn.to_q"], torch.zeros(D, D), dense["attn.to_v"], dense["proj_mlp"]])
    assert torch.allclose(changes(file)["single_blocks.1.linear1"], expected, atol=1e-5)
    updates = file.parts["transformer"].updates["single_blocks.1.linear1"]
    assert [(one.rows.start, one.rows.stop, one.rank) for one in updates] == [
        (0, D, 3), (2 * D, 3 * D, 1), (3 * D, 3 * D + M, 8),
    ]  # fmt: skip
    assert file.ranks == (1, 3, 8)


def test_the_halves_of_norm_out_change_places(tmp_path: Path) -> None:
    up, down = torch.randn(2 * D, 2), torch.randn(2, D)
    file = read(
        tmp_path, {"transformer.norm_out.linear.lora_B.weight": up, "transformer.norm_out.linear.lora_A.weight": down}
    )
    scale, shift = (up @ down).chunk(2)
    assert torch.allclose(changes(file)["final_layer.adaLN_modulation.1"], torch.cat([shift, scale]), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(tmp_path: Path, prefix: str) -> None:
    made = factors(rank=4)
    file = read(tmp_path, {prefix + key: tensor for key, tensor in lora_parts.xlabs(made).items()})
    found, expected = changes(file), deltas(made)
    attention = [name for name in expected if "attn" in name or (".linear" in name and name.startswith("single"))]
    assert found.keys() == set(attention)
    for name in attention:
        delta = expected[name]
        if name.endswith("linear1"):
            delta[3 * D :] = 0
        assert torch.equal(found[name], delta)
    assert file.kind == "XLabs names, LoRA"


@pytest.mark.parametrize(
    ("part", "prefix", "flat"),
    [
        ("clip", "lora_te1_text_model_", True),
        ("clip", "lora_te_text_model_", True),
        ("clip", "text_encoder.text_model.", False),
        ("clip", "text_encoders.clip_l.transformer.text_model.", False),
        ("clip", "text_encoders.clip_l.", False),
        ("t5", "lora_te2_", True),
        ("t5", "lora_te3_", True),
        ("t5", "text_encoder_2.", False),
        ("t5", "text_encoders.t5xxl.transformer.", False),
    ],
)
def test_text_encoders(tmp_path: Path, part: str, prefix: str, flat: bool) -> None:
    made = factors(3, CLIP if part == "clip" else T5)
    key = lora_parts.flat(prefix) if flat else lora_parts.dotted(prefix)
    ends = lora_parts.KOHYA if flat else lora_parts.PEFT
    file = read(tmp_path, lora_parts.writer(lora_parts.fused, key, ends, flat)(made))
    assert file.parts.keys() == {part}
    found = changes(file, part)
    assert found.keys() == made.keys()
    assert all(torch.equal(found[name], delta) for name, delta in deltas(made).items())


def test_a_file_with_both_encoders_and_the_transformer(tmp_path: Path) -> None:
    parts = {
        "lora_unet_": (factors(2), None),
        "lora_te1_text_model_": (factors(2, CLIP), CLIP),
        "lora_te3_": (factors(2, T5), T5),
    }
    state = {}
    for prefix, (made, _) in parts.items():
        state |= lora_parts.writer(lora_parts.fused, lora_parts.flat(prefix), lora_parts.KOHYA, True)(made)
    file = read(tmp_path, state, {"ss_network_module": "networks.lora_flux"})
    assert {part: len(file.parts[part].updates) for part in file.parts} == {
        "transformer": len(LINEARS), "clip": len(CLIP), "t5": len(T5),
    }  # fmt: skip
    assert file.kind == "kohya names, LoRA, by kohya's scripts"


def test_linear1_qkv_is_the_first_rows(tmp_path: Path) -> None:
    up, down = torch.randn(3 * D, 2), torch.randn(2, D)
    key = "diffusion_model.single_blocks.0.linear1_qkv"
    file = read(tmp_path, {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
    (update,) = file.parts["transformer"].updates["single_blocks.0.linear1"]
    assert update.rows == slice(0, 3 * D)


def test_equal_downs_are_one_update(tmp_path: Path) -> None:
    file = read(tmp_path, WRITERS["diffusers"](factors(rank=6)))
    part = file.parts["transformer"]
    assert all(len(updates) == 1 for updates in part.updates.values())
    assert part.rank("single_blocks.0.linear1") == 6


METADATA = {
    "transformer.r": 8, "transformer.lora_alpha": 16, "transformer.alpha_pattern": {"proj_out": 2},
    "transformer.base_model_name_or_path": "black-forest-labs/FLUX.1-schnell",
}  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "scales"),
    [
        (METADATA, (2.0, 0.25)),
        (METADATA | {"transformer.use_rslora": True}, (16 / 8**0.5, 2 / 8**0.5)),
        ({}, (1.0, 1.0)),
    ],
)
def test_alphas_in_diffusers_metadata(tmp_path: Path, metadata: dict[str, object], scales: tuple[float, float]) -> None:
    made = factors(8, {"single_blocks.0.linear2": (D, D + M), "img_in": (D, 16)})
    state = WRITERS["diffusers"](made)
    file = read(tmp_path, state, {"lora_adapter_metadata": json.dumps(metadata)})
    expected = deltas(made)
    assert torch.allclose(changes(file)["img_in"], expected["img_in"] * scales[0], atol=1e-4)
    assert torch.allclose(
        changes(file)["single_blocks.0.linear2"], expected["single_blocks.0.linear2"] * scales[1], atol=1e-4
    )


def test_alphas_in_pefts_config(tmp_path: Path) -> None:
    made = factors(4, {"img_in": (D, 16)})
    path = lora_parts.save(tmp_path / "adapter_model.safetensors", WRITERS["PEFT"](made))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}))
    assert torch.equal(changes(read_lora(path, MINI))["img_in"], deltas(made)["img_in"] / 2)


def test_a_whole_lokr_is_scaled_by_a_config_alone(tmp_path: Path) -> None:
    """PEFT scales a LoKr whose sides are whole, LyCORIS does not. A `diff` has no alpha."""
    sides = {"lokr_w1": torch.ones(8, 8), "lokr_w2": torch.ones(16, 16)}
    state = {f"base_model.model.transformer_blocks.0.attn.to_out.0.{end}": tensor for end, tensor in sides.items()}
    state["base_model.model.x_embedder.diff"] = torch.ones(D, 16)
    path = lora_parts.save(tmp_path / "adapter_model.safetensors", state)
    assert changes(read_lora(path, MINI))["double_blocks.0.img_attn.proj"].unique().tolist() == [1.0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 900, "alpha": 450}))
    found = changes(read_lora(path, MINI))
    assert found["double_blocks.0.img_attn.proj"].unique().tolist() == [0.5]
    assert found["img_in"].unique().tolist() == [1.0]


@pytest.mark.parametrize("alpha", ["x", [], 1e300, True])
def test_an_alpha_that_is_none(tmp_path: Path, alpha: object) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})}
    with pytest.raises(VortexCheckpointError, match="description of the LoRA"):
        read(tmp_path, WRITERS["diffusers"](factors(4)), metadata)


def test_what_has_no_effect_is_noted(tmp_path: Path) -> None:
    state = WRITERS["kohya"](factors(2))
    for name in ("lora_unet_guidance_in_in_layer", "lora_te1_text_projection"):
        state |= {f"{name}.lora_up.weight": torch.ones(D, 2), f"{name}.lora_down.weight": torch.ones(2, D)}
    state["lora_unet_final_layer_linear_x.alpha"] = torch.tensor(1.0)
    del state["lora_unet_final_layer_linear_x.alpha"]
    file = read(tmp_path, state)
    assert len(file.ignored) == 4
    assert not file.refused
    assert len(file.parts["transformer"].updates) == len(LINEARS)


def test_an_alpha_alone_is_noted(tmp_path: Path) -> None:
    state = WRITERS["kohya"](factors(2, {"img_in": (D, 16)})) | {"lora_unet_txt_in.alpha": torch.tensor(1.0)}
    assert read(tmp_path, state).ignored == {"lora_unet_txt_in.alpha": "it is an alpha without factors"}


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lora_parts.save(tmp_path / "a.safetensors", WRITERS["diffusers"](factors(3)))

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("vortex_core.storage.files.Files._fill", refuse)
    header = open_lora(path, MINI)
    assert len(header.layers) == sum(len(parts) for _, _, parts in LINEARS.values())
    assert header.nbytes > 0


def test_zeros_of_an_embedding_table_have_no_effect(tmp_path: Path) -> None:
    name = "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding"
    state = WRITERS["ComfyUI"](factors(2))
    zeros = {f"{name}.lora_up.weight": torch.zeros(77, 2), f"{name}.lora_down.weight": torch.ones(2, 64)}
    file = read(tmp_path, state | zeros | {"text_encoders.t5xxl.transformer.shared.diff": torch.zeros(99, 64)})
    assert not file.refused
    assert len(file.ignored) == 3
    file = read(tmp_path, state | zeros | {f"{name}.lora_up.weight": torch.ones(77, 2)})
    assert file.refused.keys() == zeros.keys()


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [
        ("transformer_blocks.1.attn.to_qkv", "double_blocks.1.img_attn.qkv", 3 * D),
        ("transformer_blocks.1.attn.to_added_qkv", "double_blocks.1.txt_attn.qkv", 3 * D),
        ("single_transformer_blocks.1.attn.to_qkv", "single_blocks.1.linear1", 3 * D),
    ],
)
def test_projections_that_diffusers_fused(tmp_path: Path, theirs: str, ours: str, rows: int) -> None:
    file = read(tmp_path, lora_parts.lora(f"transformer.{theirs}", rows, D, 2))
    (update,) = file.parts["transformer"].updates[ours]
    assert update.rows == slice(0, rows)


def test_data_follows_the_device(tmp_path: Path) -> None:
    """What needs W works where W is, and the file stays in host memory."""
    nowhere = torch.device("meta")
    name = "lora_unet_img_in"
    part = read(tmp_path, lora_parts.glora(name, D, 16, 2)).parts["transformer"]
    assert part.inputs["img_in"][0].of(torch.empty(D, 16, device=nowhere)).up.device == nowhere
    state = lora_parts.lora(name, D, 16, 2) | {f"{name}.dora_scale": torch.ones(D, 1)}
    (one,) = read(tmp_path, state).parts["transformer"].row_scales["img_in"]
    assert one.gains(torch.empty(D, 16, device=nowhere)).device == nowhere
