"""Files that are damaged, hostile or another model's: one sentence each, before anything large is read."""

from __future__ import annotations

import json
import random as dices
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lora_parts
import mutators
import pytest
import torch
from lora_parts import MINI, MLP, PROJ, WRITERS, D, M, factors, random
from torch import Tensor

from vortex_core.checkpoint.lora_header import open_lora
from vortex_core.checkpoint.lora_kinds import base_of, kind_of
from vortex_core.checkpoint.lora_reader import read, read_lora
from vortex_core.checkpoint.lora_roles import ROLES
from vortex_core.errors import VortexCheckpointError, VortexError
from vortex_core.flux1.spec import ModelSpec

UP, DOWN, ALPHA = (f"lora_unet_img_in.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha"))
GOOD = {UP: torch.ones(D, 2), DOWN: torch.ones(2, 16), ALPHA: torch.tensor(1.0)}


def refused(tmp_path: Path, state: dict[str, Tensor], words: str, spec: ModelSpec = MINI) -> None:
    """The header alone is enough to say it, in one sentence or two."""
    with pytest.raises(VortexCheckpointError, match=words) as caught:
        open_lora(lora_parts.save(tmp_path / "a.safetensors", state), spec)
    assert caught.value.path == str(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({DOWN: None}, "lacks lora_down .* half of it is missing"),
        ({UP: None}, "lacks lora_up .* half of it is missing"),
        ({DOWN: torch.ones(3, 16)}, "ranks differ"),
        ({UP: torch.ones(D, 1025), DOWN: torch.ones(1025, 16)}, "has rank 1025; 1 to 1024 is read"),
        ({UP: torch.ones(D, 0), DOWN: torch.ones(0, 16)}, "which is no matrix"),
        ({UP: torch.ones(D), DOWN: torch.ones(16)}, "which is no matrix"),
        ({UP: torch.ones(D, 2, 3, 3)}, "which is no matrix"),
        ({UP: torch.ones(D + 1, 2)}, "does not fit this model: .*img_in is 129 x 16 in it and 128 x 16 here"),
        ({ALPHA: torch.ones(2)}, "an alpha of 2 values"),
        ({UP: torch.ones(D, 2, dtype=torch.int32)}, "is I32; expected"),
        ({UP: torch.ones(D, 2, dtype=torch.uint8)}, "is U8; expected"),
        ({f"{UP}s": torch.ones(1)}, "holds 1 tensor that Vortex does not understand, such as"),
        ({"lora_unet_double_blocks_0_img_attn_q.alpha": torch.ones(1)}, "does not understand"),
        ({"lora_unet_img_in.lora_B.weight": torch.ones(D, 2)}, "does not understand"),
        (
            {"img_in.lora_B.weight": torch.ones(D, 2), "img_in.lora_A.weight": torch.ones(2, 16)},
            "says two things of img_in",
        ),
        ({"lora_unet_img_in.dora_scale": torch.ones(5)}, "DoRA magnitudes of"),
        ({"lora_unet_txt_in.dora_scale": torch.ones(D, 1)}, "no factors beside its DoRA"),
        ({"lora_unet_img_in.diff_b": torch.ones(5)}, "a bias of 5 values for 128 rows"),
        ({"lora_unet_img_in.hada_w1_a": torch.ones(D, 2)}, "is LoRA and LoHa at once"),
        ({"lora_unet_txt_in.hada_w1_a": torch.ones(D, 2)}, "lacks hada_w1_b"),
        ({"lora_unet_txt_in.lokr_w1": torch.ones(8, 8)}, "lacks lokr_w2_a"),
        ({"lora_unet_txt_in.a1.weight": torch.ones(64, 2)}, "lacks a2"),
        ({"lora_unet_txt_in.rescale": torch.ones(D, 1)}, "oft_blocks"),
        ({"lora_unet_txt_in.oft_blocks": torch.ones(4, 8, 7)}, "oft_blocks"),
        ({"lora_unet_txt_in.oft_blocks": torch.ones(5, 8, 8, 8)}, "no butterflies"),
        ({"lora_unet_txt_in.diff": torch.ones(D, 65)}, "does not fit this model"),
        ({"diffusion_model.single_blocks.0.norm.key_norm.diff": torch.ones(5)}, "does not fit this model"),
        (
            {"diffusion_model.single_blocks.0.norm.key_norm.lora_B.weight": torch.ones(5, 2)},
            "a norm, which has no matrix",
        ),
    ],
)
def test_what_does_not_fit(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    state = {key: tensor for key, tensor in {**GOOD, **change}.items() if tensor is not None}
    refused(tmp_path, state, words)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [UP, DOWN, ALPHA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_is_not_finite(tmp_path: Path, key: str, value: float, dtype: torch.dtype) -> None:
    tensor = GOOD[key].clone().view(-1)
    tensor[-1] = value
    state = GOOD | {key: tensor.view(GOOD[key].shape).to(dtype)}
    with pytest.raises(VortexCheckpointError, match=f"{key} holds NaN or infinite values"):
        read_lora(lora_parts.save(tmp_path / "a.safetensors", state), MINI)


def save_nothing(path: Path) -> None:
    lora_parts.save(path, {})


def cut(path: Path) -> None:
    lora_parts.save(path, GOOD)
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a.safetensors", save_nothing, "is empty: it holds no tensors"),
        ("a.safetensors", cut, "the download is incomplete"),
        ("a.safetensors", lambda path: path.write_bytes(b""), "it is empty"),
        ("a.safetensors", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "a zip file or a pickle"),
        ("a.safetensors", lambda path: path.write_bytes(b"<!DOCTYPE html>"), "a web page"),
        ("a.pt", lambda path: path.write_bytes(b"\x80\x02"), "is a pickle"),
        ("a.ckpt", lambda path: path.write_bytes(b"\x80\x02"), "is a pickle"),
        ("a.bin", lambda path: path.write_bytes(b"\x80\x02"), "is a pickle"),
        ("a.gguf", lambda path: path.write_bytes(b"GGUF"), "not a .safetensors file"),
        ("a.txt", lambda path: path.write_bytes(b"x"), "not a .safetensors file"),
        ("a.safetensors", lambda path: path.mkdir(), "is a folder"),
        ("a.safetensors", lambda path: None, "There is no LoRA at"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / name)
    with pytest.raises(VortexCheckpointError, match=words):
        open_lora(tmp_path / name, MINI)


def pair(key: str, n: int, k: int) -> dict[str, Tensor]:
    return {f"{key}.lora_up.weight": torch.ones(n, 1), f"{key}.lora_down.weight": torch.ones(1, k)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, 640), "Stable Diffusion"),
        (pair("lora_unet_input_blocks_4_1_proj_in", 640, 640), "Stable Diffusion"),
        (pair("lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280), "a LoRA of Stable Diffusion XL"),
        (pair("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536), "a LoRA of Stable Diffusion 3"),
        (
            pair("transformer.transformer_blocks.0.attn.to_q", 1536, 1536),
            "a LoRA of Stable Diffusion 3 or 3.5 medium: .*1536",
        ),
        (
            pair("transformer.transformer_blocks.23.attn.to_q", 1536, 1536),
            "Stable Diffusion 3 or 3.5 medium, with 24 double blocks",
        ),
        (pair("diffusion_model.double_stream_modulation_img.lin", 18432, 3072), "a LoRA of FLUX.2"),
        (pair("diffusion_model.double_blocks.0.img_attn.qkv", 18432, 6144), "a LoRA of FLUX.2: "),
        (pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 27648, 3072), "a LoRA of FLUX.2"),
        (pair("transformer.transformer_blocks.0.img_mlp.net.0.proj", 12288, 3072), "a LoRA of Qwen-Image"),
        (
            pair("transformer.transformer_blocks.59.attn.to_q", 3072, 3072),
            "Qwen-Image, with 60 double blocks where this one has 19",
        ),
        (pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120), "a LoRA of Wan"),
        (pair("lora_unet_blocks_0_cross_attn_k", 5120, 5120), "a LoRA of Wan"),
        (pair("transformer.double_blocks.0.img_attn_qkv", 9216, 3072), "a LoRA of HunyuanVideo"),
        (pair("lora_unet_single_blocks_39_linear1", 21504, 3072), "HunyuanVideo, with 40 single blocks"),
        (pair("diffusion_model.distilled_guidance_layer.in_proj", 5120, 64), "a LoRA of Chroma"),
        (pair("diffusion_model.double_stream_blocks.0.block.attn1", 2560, 2560), "a LoRA of HiDream"),
        (pair("diffusion_model.layers.0.attention.qkv", 3840, 3840), "Lumina 2 or Z-Image"),
        (pair("img_in", 3072, 128), "control models .Canny or Depth.: its img_in takes 128 channels"),
        (pair("transformer.x_embedder", 3072, 384), "control models .Fill.: its img_in takes 384 channels"),
        ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.ones(1)}, "is an IP-Adapter"),
        ({"transformer_blocks.0.qkv_proj.lora_down": torch.ones(1, 2)}, "Nunchaku's own format"),
        ({"img_in.weight": torch.ones(1, 2), "single_blocks.0.norm.key_norm.scale": torch.ones(1)}, "is not a LoRA"),
        ({"x.wscales": torch.ones(1, 2)}, "quantized by SVDQuant"),
    ],
)
def test_other_models_are_named(tmp_path: Path, state: dict[str, Tensor], words: str) -> None:
    refused(tmp_path, state, words, ModelSpec())


def test_a_lora_of_the_released_model_for_the_miniature(tmp_path: Path) -> None:
    refused(
        tmp_path,
        pair("lora_unet_double_blocks_18_img_attn_proj", 3072, 3072),
        "a model with 19 double blocks where this one has 2",
    )
    refused(
        tmp_path,
        pair("lora_unet_double_blocks_1_img_attn_proj", 3072, 3072),
        "img_attn.proj is 3072 x 3072 in it and 128 x 128",
    )


def test_no_more_than_a_few_keys_are_listed(tmp_path: Path) -> None:
    state = GOOD | {f"what_is_{i}.lora_up.weight": torch.ones(1) for i in range(400)}
    refused(tmp_path, state, "400 tensors that Vortex does not understand")


SPECIMENS = {
    "kohya": WRITERS["kohya"](factors(2)),
    "diffusers": WRITERS["diffusers"](factors(2)),
    "xlabs": lora_parts.xlabs(factors(2)),
    "others": lora_parts.loha("lora_unet_img_in", D, 16, 2)
    | lora_parts.lokr("lora_unet_double_blocks_0_img_attn_proj", (8, 8), (16, 16), (None, 2))
    | lora_parts.glora("lora_unet_double_blocks_0_img_mlp_0", M, D, 2)
    | lora_parts.lora("lora_unet_single_blocks_0_linear2", D, D + M, 2)
    | {
        "lora_unet_single_blocks_0_linear2.dora_scale": torch.ones(D, 1),
        "lora_unet_double_blocks_1_txt_attn_proj.oft_blocks": random(16, 8, 8),
        "lora_unet_double_blocks_1_img_attn_proj.oft_blocks": random(2, 32, 4, 4),
        f"lora_unet_{PROJ}.diff_b".replace(".", "_", PROJ.count(".")): random(D),
        "diffusion_model.single_blocks.0.norm.key_norm.set_weight": random(D),
        f"lora_unet_{MLP}.diff_b".replace(".", "_", MLP.count(".")): random(M),
    },
}


def renamed(dice: dices.Random, data: bytes) -> bytes:
    """Keys that change their roles, so that modules have odd sets of them."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for key in dice.sample(sorted(header), min(len(header), dice.choice((1, 2, 6)))):
        if not key.startswith("__"):
            header[key.partition(".")[0] + dice.choice(list(ROLES))] = header.pop(key)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


METADATA = {
    "lora_adapter_metadata": json.dumps(
        {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"x": 1}}
    ),
    "modelspec.architecture": "flux-1-dev/lora",
}


@pytest.mark.slow
def test_2000_mutated_headers(tmp_path: Path) -> None:
    """Read, or refused in words; nothing else."""
    sound = {
        name: lora_parts.save(tmp_path / f"{name}.safetensors", state, METADATA).read_bytes()
        for name, state in SPECIMENS.items()
    }
    for name in sound:
        read_lora(tmp_path / f"{name}.safetensors", MINI)
    outcomes: Counter[str] = Counter()
    path = tmp_path / "mutated.safetensors"
    for number in range(2000):
        dice = dices.Random(number)
        data = sound[dice.choice(sorted(sound))]
        path.write_bytes((renamed if number % 4 == 0 else mutators.safetensors)(dice, data))
        try:
            header = open_lora(path, MINI)
            kind_of(header), base_of(header), read(header)
            outcomes["read"] += 1
        except VortexError as error:
            outcomes["refused" if len(str(error)) < 1500 else f"input {number} is refused at length"] += 1
        except Exception as error:
            raise AssertionError(f"input {number}") from error
    assert outcomes.keys() == {"read", "refused"}
    assert outcomes["read"] > 50, outcomes
    assert outcomes["refused"] > 1000, outcomes
