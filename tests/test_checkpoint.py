"""Folders that are wrong in some way get a sentence, before anything is loaded; sharded ones read like whole ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vortex_core import Engine, VortexCheckpointError, load_flux_schnell
from vortex_core.checkpoint.bundle import open_bundle, open_pipeline
from vortex_core.storage.files import open_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the miniature to damage."""
    return shutil.copytree(tiny_dir, tmp_path / "model-copy")


def refused(model: Path | str, sentence: str) -> VortexCheckpointError:
    with pytest.raises(VortexCheckpointError, match=sentence) as refusal:
        load_flux_schnell(model, device="cpu")
    return refusal.value


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_folder() -> None:
    refused("no/such/model", "There is no model at no/such/model.*never downloads")


def test_an_incomplete_folder(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder_2")
    assert refused(copy, "lacks the T5 encoder .*Give files for them as `t5`").path == str(copy)


def test_a_pickle_file(tmp_path: Path) -> None:
    path = tmp_path / "flux.ckpt"
    path.write_bytes(b"\x80\x02")
    refused(path, "flux.ckpt is a pickle, which can run code")


def test_a_folder_of_pickles(copy: Path) -> None:
    (copy / "transformer" / WEIGHTS).rename(copy / "transformer" / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin is a pickle")


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "transformer" / WEIGHTS).unlink()
    refused(copy, "transformer holds no .safetensors")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2, 2)}, path)
    refused(path, "lacks the transformer; CLIP")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_dev_file(tmp_path: Path, prefix: str) -> None:
    names = ("guidance_in.in_layer.weight", "double_blocks.0.img_attn.qkv.weight")
    save_file({prefix + name: torch.zeros(2, 2) for name in names}, tmp_path / "flux1-dev.safetensors")
    refused(tmp_path / "flux1-dev.safetensors", r"FLUX\.1-dev checkpoint.*Point it at a FLUX\.1-schnell")


def test_a_dev_folder(copy: Path) -> None:
    edit_config(copy / "transformer", guidance_embeds=True)
    refused(copy, r"FLUX\.1-dev checkpoint")


def test_dev_weights_behind_a_schnell_config(copy: Path) -> None:
    extra = {"time_text_embed.guidance_embedder.linear_1.weight": torch.zeros(2, 2)}
    save_file(extra, copy / "transformer" / "extra.safetensors")
    refused(copy, r"FLUX\.1-dev checkpoint")


def test_a_missing_tensor(copy: Path) -> None:
    path = copy / "transformer" / WEIGHTS
    tensors = load_file(path)
    del tensors["transformer_blocks.0.attn.to_out.0.weight"]
    save_file(tensors, path)
    refused(copy, r"lacks 1 tensors, such as double_blocks\.0\.img_attn\.proj\.weight")


def test_a_tensor_of_another_shape(copy: Path) -> None:
    path = copy / "vae" / WEIGHTS
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"] = torch.zeros(4, 32, 3, 3)
    save_file(tensors, path)
    refused(copy, r"does not fit together: conv_out.weight: expected .* found \(4, 32, 3, 3\)")


def test_a_damaged_file(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(copy, "is not a readable safetensors file.*Download it again")


def test_a_damaged_config(copy: Path) -> None:
    (copy / "vae" / "config.json").write_text("{")
    refused(copy, "missing or not JSON")


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("transformer", {"joint_attention_dim": 100}, "says joint_attention_dim 100, and the tensors have 128"),
        ("transformer", {"num_layers": 5}, "says num_layers 5, and the tensors have 2"),
        ("vae", {"block_out_channels": [32, 64]}, "block_out_channels should be 4 numbers"),
    ],
)
def test_a_config_of_another_model(copy: Path, part: str, changes: dict[str, object], sentence: str) -> None:
    edit_config(copy / part, **changes)
    refused(copy, sentence)


def test_a_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / "vocab.json").unlink(missing_ok=True)
    refused(copy, "tokenizer holds no tokenizer.json")


def test_clips_tokenizer_in_its_older_form(copy: Path) -> None:
    """The released folder has vocab.json and merges.txt instead of tokenizer.json."""
    expected = open_bundle(copy).tokenizer.encode("a red circle").ids
    model = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    assert open_bundle(copy).tokenizer.encode("a red circle").ids == expected


def test_sharded_weights_read_like_whole_ones(copy: Path, engine: Engine) -> None:
    folder = copy / "transformer"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    arguments = {"seed": 1, "height": 64, "width": 64, "steps": 1}
    sharded = load_flux_schnell(copy, device="cpu").generate("a red circle", **arguments)
    assert torch.equal(sharded, engine.generate("a red circle", **arguments))
    (folder / "b.safetensors").unlink()
    refused(copy, "lacks b.safetensors, which its index names")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="NOT RUN: Linux alone says what is mapped")
def test_nothing_is_mapped(copy: Path) -> None:
    files = open_file(copy / "vae" / WEIGHTS)
    tensors = [files.read(name) for name in files.names()]
    assert sum(tensor.nbytes for tensor in tensors) > 100_000
    assert str(copy) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("how", ["truncated", "rewritten", "replaced", "removed"])
def test_a_file_that_changes_underneath(copy: Path, how: str) -> None:
    """What is cut or written to is an error; a new file under the name leaves the old one, which is open, as it was."""
    path = copy / "vae" / WEIGHTS
    files = open_file(path)
    first, *_, last = sorted(files.names(), key=lambda name: files._places[name][1].offset)
    expected = load_file(path)[last]
    files.read(first)
    match how:
        case "truncated":
            os.truncate(path, path.stat().st_size // 2)
        case "rewritten":
            os.utime(path, ns=(1, 1))
        case "replaced":
            save_file({"other": torch.zeros(3)}, path.with_name("new"))
            path.with_name("new").replace(path)
        case "removed":
            path.unlink()
    if how in ("replaced", "removed"):
        assert torch.equal(files.read(last), expected)
    else:
        with pytest.raises(VortexCheckpointError, match=r"was changed while it was read.*Load it again once"):
            files.read(last)


def test_clip_under_either_name(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    prefixed = all(name.startswith("text_model.") for name in tensors)
    other = {n.removeprefix("text_model.") if prefixed else f"text_model.{n}": t for n, t in tensors.items()}
    expected = open_bundle(copy).parts["clip"].tensors.read("final_layer_norm.weight")
    save_file(other, path)
    assert torch.equal(open_bundle(copy).parts["clip"].tensors.read("final_layer_norm.weight"), expected)


def test_a_quantized_pipeline_is_refused(tiny_dir: Path) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_dir)
    pipe.transformer.quantization_method = "bitsandbytes"
    with pytest.raises(VortexCheckpointError, match="is quantized \\('bitsandbytes'\\)"):
        open_pipeline(pipe)
