"""Files that Vortex does not read are told as what they are, and what lies beside a weight is never passed over."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import specimens
import torch
from safetensors.torch import load_file, save_file
from specimens import SMALL, halves, look, read, save, write_gguf
from torch import Tensor

from vortex_core import VortexCheckpointError, VortexInputError
from vortex_core.checkpoint.bundle import find_parts, open_bundle
from vortex_core.checkpoint.dialects import find_part, is_cut
from vortex_core.checkpoint.key_maps import modulation_shapes, step_shapes
from vortex_core.cli.inspection import inspect
from vortex_core.flux1.spec import FluxSpec
from vortex_core.storage import headers
from vortex_core.storage.files import StateDict
from vortex_core.storage.finite_weights import Finite
from vortex_core.storage.headers import GGML

NAME = "double_blocks.0.img_mlp.0"
WEIGHT = f"{NAME}.weight"


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return specimens.plain()


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(VortexCheckpointError, match=sentence) as refusal:
        look(path)
    assert str(path) in str(refusal.value)


def text(said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


BESIDE = {
    f"{NAME}.scale": "lies beside a weight in F8_E4M3",
    f"{NAME}_scale": "lies beside a weight in F8_E4M3",
    f"{WEIGHT}.absmax": "lies beside a weight in F8_E4M3",
    f"{NAME}.weight_scale_inv": "in fp8 with scales by blocks",
    f"{NAME}.weight_quantizer._scale": "quantized by ModelOpt",
    f"{NAME}.zero_point": "quantized by SDNQ",
    f"{NAME}.weight_scale_2": "in NVFP4",
    f"{NAME}.SCB": "LLM.int8",
    f"{WEIGHT}._data": "quantized by quanto",
    f"{WEIGHT}:qdata": "quantized by torchao",
    f"{NAME}.wscales": "SVDQuant",
    f"{NAME}.qzeros": "GPTQ or AWQ",
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_a_weight(tmp_path: Path, plain: dict[str, Tensor], name: str) -> None:
    tensors = plain | {WEIGHT: plain[WEIGHT].to(torch.float8_e4m3fn), name: torch.ones(4)}
    refused(save(tensors, tmp_path / "beside.safetensors"), f"{BESIDE[name]}.*Use the model's bf16, fp8, NF4")


def test_a_scale_beside_16_bits_or_along_columns(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    scale = {f"{NAME}.weight_scale": torch.ones(())}
    refused(save(plain | scale, tmp_path / "half.safetensors"), "weight_scale lies beside a weight in BF16")
    square = "double_blocks.0.img_attn.proj"
    columns = {f"{square}.weight": plain[f"{square}.weight"].to(torch.float8_e4m3fn)}
    columns |= {f"{square}.weight_scale": torch.ones(1, SMALL.hidden)}
    refused(save(plain | columns, tmp_path / "columns.safetensors"), r"one a row, but \(1, 128\)")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"format": "int8_tensorwise", "convrot": True}, "in int8 with rotated weights"),
        ({"format": "int8_tensorwise"}, "in int8,"),
        ({"format": "mxfp8"}, "in mxfp8"),
        ({"format": "float8_e4m3fn", "convrot": True}, "rotated"),
        ({"format": "new"}, "described as"),
        ([], "described as"),
    ],
)
@pytest.mark.parametrize("where", ["beside", "metadata"])
def test_what_comfyui_says_of_a_layer(
    tmp_path: Path, plain: dict[str, Tensor], said: object, words: str, where: str
) -> None:
    path, tensors = tmp_path / "comfy.safetensors", dict(plain)
    metadata = None
    if where == "beside":
        tensors[f"{NAME}.comfy_quant"] = text(said)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {NAME: said}})}
    save_file(tensors, path, metadata=metadata)
    refused(path, f"{WEIGHT} is .*{words}")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_that_lies_there_as_bytes(tmp_path: Path, plain: dict[str, Tensor], prefix: str) -> None:
    eighth = plain[WEIGHT].to(torch.float8_e4m3fn)
    tensors = {**plain, WEIGHT: eighth.view(torch.uint8), f"{NAME}.weight_scale": torch.tensor(0.5)}
    layers = {"layers": {NAME: {"format": "float8_e4m3fn"}}}
    path = tmp_path / "bytes.safetensors"
    save_file(
        {prefix + n: t for n, t in tensors.items()}, path, metadata={"_quantization_metadata": json.dumps(layers)}
    )
    assert look(path)
    found = find_parts(path, {})[0]["transformer"].tensors.read(WEIGHT)
    assert torch.equal(found, eighth.float() * 0.5)


def test_nf4_whose_bytes_wear_another_type(tmp_path: Path) -> None:
    packed = specimens.packed(False)
    path = save(packed | {WEIGHT: packed[WEIGHT].view(-1).view(torch.bfloat16)}, tmp_path / "worn.safetensors")
    assert look(path)
    found = find_parts(path, {})[0]["transformer"].tensors.read_nf4(WEIGHT)
    assert torch.equal(found.packed.view(-1), packed[WEIGHT].view(-1))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "quanto", "weights_dtype": "int8"}, "quantized by quanto"),
        ({"quant_method": "sdnq"}, "SDNQ"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "LLM.int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "'fp4'"),
        ({"quant_method": "nobody's"}, "quantized, it says, by"),
    ],
)
def test_a_config_of_another_quantization(tmp_path: Path, plain: dict[str, Tensor], said: Any, words: str) -> None:
    save(plain, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    refused(tmp_path, f"{words}.*as its config.json says")


def test_metadata_that_names_a_quantization(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    for key, value, words in (
        ("quantization_format", "quanto", "quanto"),
        ("model_class", "NunchakuFluxTransformer2dModelV2", "SVDQuant"),
        ("quantization_config", '{"method": "svdquant"}', "SVDQuant"),
        (WEIGHT, '{"_type": "Float8Tensor"}', "torchao"),
    ):
        path = tmp_path / "said.safetensors"
        save_file(plain, path, metadata={key: value})
        refused(path, words)


BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n": "a Git LFS pointer",
    b"\n<!DOCTYPE html><html>Access denied</html>": "a web page",
    b"<?xml version='1.0'?><Error/>": "a web page",
    b"\x00\x05\x16\x07" + bytes(4000): "macOS' companion",
    b"PK\x03\x04" + bytes(100): "a zip file or a pickle",
    bytes(5000): "nothing but zeros",
    b'{"weight_map": {}}': "a text of JSON",
    b"": "empty|has 0 bytes|goes on at byte",
}


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
@pytest.mark.parametrize("data", BEGINNINGS)
def test_what_is_no_file_of_weights(tmp_path: Path, data: bytes, ending: str) -> None:
    path = tmp_path / f"flux{ending}"
    path.write_bytes(data)
    refused(path, f"is not a readable (safetensors|GGUF) file.*({BEGINNINGS[data]})")


def test_names_that_files_have(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    for name in ("flux1-schnell.sft", "FLUX1.SAFETENSORS", "x" * 238 + ".safetensors"):
        save(plain, tmp_path / "new").rename(tmp_path / name)
        assert look(tmp_path / name)
    np = pytest.importorskip("numpy")
    values = {name: (tensor.float().numpy().astype(np.float32), None) for name, tensor in plain.items()}
    named_wrongly = write_gguf(tmp_path / "flux.safetensors", "flux", values)
    assert "GGUF" in find_parts(named_wrongly, {})[0]["transformer"].words


def test_pipes_and_names_that_cannot_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "flux.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for path, words in (
        (tmp_path / "flux.safetensors", "is a pipe or a device"),
        (tmp_path / "loop.safetensors", "could not be read"),
        (tmp_path / ("x" * 300), "could not be read"),
    ):
        with pytest.raises(VortexCheckpointError, match=words):
            open_bundle(path)
    with pytest.raises(VortexInputError, match="zero byte"):
        open_bundle("nul\0")


def shards(folder: Path, tensors: dict[str, Tensor], count: int, name: str = "model") -> list[Path]:
    names = sorted(tensors)
    paths = [folder / f"{name}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        save_file({key: tensors[key] for key in names[i::count]}, path)
    return paths


def test_shards_without_an_index(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    (tmp_path / "transformer").mkdir()
    first, second, third = shards(tmp_path / "transformer", plain, 3)
    for given in (tmp_path, second):
        assert look(given)
    (tmp_path / "transformer" / "._model-00001-of-00003.safetensors").write_bytes(b"no weights")
    assert look(tmp_path)
    leftover = tmp_path / "transformer" / "model-00001-of-00002.safetensors"
    save_file({"x": torch.zeros(1)}, leftover)
    with pytest.raises(VortexCheckpointError, match="shards of several splits of model"):
        look(tmp_path)
    leftover.unlink()
    save_file({WEIGHT: plain[WEIGHT]}, tmp_path / "transformer" / "other.safetensors")
    with pytest.raises(VortexCheckpointError, match=f"both hold '{WEIGHT}'.*Remove it"):
        look(tmp_path)
    (tmp_path / "transformer" / "other.safetensors").unlink()
    third.unlink()
    for given in (tmp_path, first):
        with pytest.raises(VortexCheckpointError, match=r"2 of 3 shards of model; model-00003-of-00003\.s"):
            look(given)


def test_an_index(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    first, second = shards(tmp_path, plain, 2)
    places = {name: path.name for path in (first, second) for name in load_file(path)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    save_file(plain, tmp_path / "model-00001-of-00001.safetensors")  # of another split, which the index does not name
    assert look(index)
    index.write_text(json.dumps({"weight_map": places | {WEIGHT: first.name, "img_in.weight": first.name,
                                                        "img_in.bias": first.name}}))  # fmt: skip
    with pytest.raises(VortexCheckpointError, match=r"does not hold .* which model\.safetensors\.index\.json says"):
        look(index)


def test_variants_beside_plain_weights(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    (tmp_path / "transformer").mkdir()
    save(plain, tmp_path / "transformer" / "model.safetensors")
    save({name: tensor * 2 for name, tensor in plain.items()}, tmp_path / "transformer" / "model.fp16.safetensors")
    found = find_parts(tmp_path, {})[0]["transformer"].tensors.read(WEIGHT)
    assert torch.equal(found, plain[WEIGHT])


def many(blocks: int) -> dict[str, Tensor]:
    spec = FluxSpec(hidden=128, heads=1, double_blocks=blocks, single_blocks=blocks, context=64, vec=64)
    return {name: torch.zeros(p.shape).bfloat16() for half in halves(spec) for name, p in half.named_parameters()}


def test_gaps_in_blocks(tmp_path: Path) -> None:
    whole, path = many(3), tmp_path / "flux.safetensors"
    for gone in ("double_blocks.0.", "single_blocks.1."):
        save({name: tensor for name, tensor in whole.items() if gone not in name}, path)
        if gone == "double_blocks.0.":
            assert not look(path)
        else:
            refused(path, "lacks single_blocks.1, though it has single_blocks.2")
    save({name: tensor for name, tensor in whole.items() if name != "single_blocks.1.linear1.weight"}, path)
    refused(path, "holds 3 single blocks and would be read as having 1")
    save(whole, path)
    assert "3 double and 3 single blocks" in inspect(path).found[0].words
    assert "19 and 38" not in inspect(path).found[0].words
    assert is_cut(FluxSpec(double_blocks=18))
    assert not is_cut(FluxSpec())


@pytest.mark.parametrize("blocks", [8, 19])
def test_guidance_embeddings(blocks: int) -> None:
    names = [f"double_blocks.{i}.img_attn.qkv.weight" for i in range(blocks)] + ["guidance_in.in_layer.weight"]
    state = StateDict({name: torch.zeros(1) for name in names}, "a file")
    with pytest.raises(VortexCheckpointError, match="Flex.1-alpha" if blocks == 8 else "This is a FLUX.1-dev"):
        find_part(state, "transformer")


@pytest.mark.parametrize("spec", [FluxSpec(), SMALL])
def test_shapes_are_those_of_the_modules(spec: FluxSpec) -> None:
    for shapes, half in zip((step_shapes(spec), modulation_shapes(spec)), halves(spec), strict=True):
        assert shapes == {name: tuple(p.shape) for name, p in half.named_parameters()}


def test_ggml_types_are_those_of_the_package() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: sizes for kind, sizes in GGML.items() if kind in theirs} == {
        k: theirs[k] for k in GGML if k in theirs
    }


def hostile(kind: int, count: int, data: bytes) -> bytes:
    """A GGUF file whose one key is an array."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    return head + struct.pack("<IIQ", 9, kind, count) + data


def test_a_long_array_in_gguf(tmp_path: Path, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over as a whole, or refused: neither read nor walked through."""
    passed: list[int] = []
    skip = headers._Cursor.skip
    monkeypatch.setattr(headers._Cursor, "skip", lambda *arguments: passed.append(1) or skip(*arguments))
    path = tmp_path / "flux.gguf"
    for data in (
        hostile(0, 30_000_000, bytes(30_000_000)),
        hostile(0, 2**63, bytes(9)),
        hostile(8, 3_000_000, bytes(24_000_000)),
        hostile(9, 10, struct.pack("<IQ", 9, 1) * 1000),
    ):
        path.write_bytes(data)
        bytes_read.clear(), passed.clear()
        with pytest.raises(VortexCheckpointError, match=r"is not a readable GGUF|holds no part of FLUX"):
            inspect(path)
        assert sum(bytes_read) < 2e6
        assert len(passed) <= 5  # arrays of arrays, as deep as they are followed


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = write_gguf(tmp_path / "qwen.gguf", "qwen2", {"token_embd.weight": (np.ones((32, 32), np.float32), None)})
    refused(path, r"is a GGUF file of a 'qwen2' model.*Point it at such a model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 500, 1000])
def test_what_is_not_finite_is_found(dtype: torch.dtype, value: float, at: int) -> None:
    tensor = torch.full((1001,), torch.finfo(dtype).max, dtype=dtype)
    assert Finite("a file").watch("a", tensor) is tensor  # a sum would exceed the type
    tensor[at] = value
    with pytest.raises(VortexCheckpointError, match="a file: a holds NaN or infinite values"):
        Finite("a file").watch("a", tensor)


@pytest.mark.parametrize("name", ["img_in.bias", "double_blocks.0.img_attn.norm.query_norm.scale", "txt_in.weight"])
def test_nan_in_what_stays_in_16_bits(tmp_path: Path, plain: dict[str, Tensor], name: str) -> None:
    broken = plain[name].clone()
    broken.view(-1)[-1] = torch.nan
    with pytest.raises(VortexCheckpointError, match=f"{name} holds NaN or infinite"):
        read(save(plain | {name: broken}, tmp_path / "nan.safetensors"))
