"""Whatever is wrong with a file: one sentence that names it, before any memory is taken; nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import specimens
import torch
from safetensors.torch import load_file, save_file
from specimens import look, save
from torch import Tensor

from vortex_core import Engine, VortexCheckpointError, load_flux_schnell
from vortex_core.checkpoint import cache as cache_module
from vortex_core.checkpoint.bundle import open_bundle
from vortex_core.checkpoint.cache import Cache
from vortex_core.checkpoint.quantize import quantize_file
from vortex_core.errors import VortexWarning
from vortex_core.flux1.spec import VaeSpec

NAME = "double_blocks.0.img_mlp.0.weight"
DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return specimens.plain()


@pytest.fixture(scope="module")
def packed() -> dict[bool, dict[str, Tensor]]:
    return {nested: specimens.packed(nested) for nested in (False, True)}


def refused(path: Path, sentence: str) -> VortexCheckpointError:
    with pytest.raises(VortexCheckpointError, match=sentence) as refusal:
        look(path)
    assert str(path) in str(refusal.value)
    assert refusal.value.path is not None
    return refusal.value


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_the_sound_files_are_sound(
    tmp_path: Path, plain: dict[str, Tensor], packed: dict[bool, dict[str, Tensor]], nested: bool
) -> None:
    assert look(save(plain, tmp_path / "plain.safetensors"))
    assert look(save(packed[nested], tmp_path / "nf4.safetensors"))


@pytest.mark.parametrize("length", [0, 1, 7, 100_000_001, 2**40, 2**63, 2**64 - 1, None])
def test_a_header_length_that_lies(tmp_path: Path, plain: dict[str, Tensor], length: int | None) -> None:
    path = save(plain, tmp_path / "lying.safetensors")
    data = path.read_bytes()
    if length is None:
        length = int.from_bytes(data[:8], "little") + 8
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(path, r"is not a readable safetensors file.*Download it again")


@pytest.mark.parametrize("change", [(0, 2), (-2, -2), (10**12, 10**12), (2, 0)])
def test_offsets_that_overlap_or_leave_the_file(
    tmp_path: Path, plain: dict[str, Tensor], change: tuple[int, int]
) -> None:
    path = save(plain, tmp_path / "offsets.safetensors")
    header, data = header_of(path)
    begin, end = header[NAME]["data_offsets"]
    header[NAME]["data_offsets"] = [begin + change[0], end + change[1]]
    refused(write(path, header, data), r"is not a readable safetensors file.*Download it again")


def nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = torch.nan
    return tensor


def state_with(**changes: object) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        said = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
WRONG_NF4 = {
    "NaN absmax": (False, f"{NAME}.absmax", nan, r"absmax holds NaN or infinite values.*download it again"),
    "infinite absmax": (False, f"{NAME}.absmax", lambda t: t / 0, "absmax holds NaN or infinite"),
    "nested NaN": (True, f"{NAME}.nested_absmax", nan, "nested_absmax holds NaN or infinite"),
    "short absmax": (False, f"{NAME}.absmax", lambda t: t[1:].clone(), r"absmax holds \d+ values; expected \d+"),
    "absmax of integers": (False, f"{NAME}.absmax", lambda t: t.int(), "absmax is I32; expected F64 or F32"),
    "other levels": (False, f"{NAME}.quant_map", lambda t: t * 2, "has levels other than NF4's"),
    "short weight": (False, NAME, lambda t: t[1:].clone(), r"img_mlp.0.weight holds \d+ bytes of U8; expected \d+"),
    "weight of floats": (False, NAME, lambda t: t.float(), r"img_mlp.0.weight holds \d+ bytes of F32; expected \d+"),
    "blocks of 128": (False, STATE, state_with(blocksize=128), "blocks of 128; Vortex reads nf4 with blocks of 64"),
    "a shape of nothing": (False, STATE, state_with(shape=[0, 64]), "0 x 64 in NF4.*cannot be"),
    "a shape of words": (False, STATE, state_with(shape="wide"), "does not say how it was quantized"),
    "a state that is no JSON": (False, STATE, lambda t: t[1:].clone(), "does not say how it was quantized"),
    "nested blocks of 0": (True, STATE, state_with(nested_blocksize=0), "cannot be"),
    "nested offset NaN": (True, STATE, state_with(nested_offset=float("nan")), "cannot be"),
    "another type": (False, STATE, state_with(quant_type="int4"), "is int4 with blocks of 64; Vortex reads nf4"),
    "another size": (False, STATE, state_with(shape=[256, 256]), r"img_mlp.0.weight.*"),
}


@pytest.mark.parametrize("case", WRONG_NF4)
def test_nf4_that_is_wrong(tmp_path: Path, packed: dict[bool, dict[str, Tensor]], case: str) -> None:
    nested, key, change, sentence = WRONG_NF4[case]
    tensors = dict(packed[nested])
    tensors[key] = change(tensors[key])
    assert NAME in str(refused(save(tensors, tmp_path / "wrong.safetensors"), sentence))


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_quant_map"])
def test_nf4_that_lacks_a_part(tmp_path: Path, packed: dict[bool, dict[str, Tensor]], part: str) -> None:
    tensors = dict(packed[True])
    del tensors[f"{NAME}.{part}"]
    refused(save(tensors, tmp_path / "lacking.safetensors"), f"{NAME}.{part} is missing")


def test_fp4(tmp_path: Path, packed: dict[bool, dict[str, Tensor]]) -> None:
    tensors = {name.replace("__nf4", "__fp4"): tensor for name, tensor in packed[False].items()}
    refused(
        save(tensors, tmp_path / "fp4.safetensors"),
        "is in FP4 of bitsandbytes, which Vortex does not",
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_a_weight_of_another_type(tmp_path: Path, plain: dict[str, Tensor], dtype: torch.dtype) -> None:
    path = save(plain | {NAME: torch.zeros(plain[NAME].shape, dtype=dtype)}, tmp_path / "typed.safetensors")
    refused(path, rf"{NAME} is \w+; expected F64 or F32 or F16 or BF16.*download it again")


def test_fp8_scales_by_blocks(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    eighth = {NAME: plain[NAME].to(torch.float8_e4m3fn), NAME.replace(".weight", ".weight_scale"): torch.ones(4, 2)}
    refused(save(plain | eighth, tmp_path / "blocks.safetensors"), "weight_scale holds 8 values, neither one nor one a")


def test_a_shape_of_another_model_and_a_missing_tensor(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    wrong = save(plain | {NAME: torch.zeros(64, 64)}, tmp_path / "shape.safetensors")
    refused(wrong, rf"{NAME}: expected \(512, 128\), found \(64, 64\). Download it again")
    lacking = save({k: v for k, v in plain.items() if k != NAME}, tmp_path / "lacking.safetensors")
    refused(lacking, f"lacks 1 tensors, such as {NAME}.*run it again")


STRANGERS = {
    "Stable Diffusion checkpoint": "model.diffusion_model.input_blocks.0.0.weight",
    "Stable Diffusion U-Net": "down_blocks.0.resnets.0.conv1.weight",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "Chroma": "distilled_guidance_layer.in_proj.weight",
    r"FLUX\.2": "double_stream_modulation_img.lin.weight",
    "LoRA, not a model: Vortex adds it to one": "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
    r"FLUX\.1-dev checkpoint, or one made from it, such as Kontext": "guidance_in.in_layer.weight",
}


@pytest.mark.parametrize("words", STRANGERS)
def test_other_models(tmp_path: Path, plain: dict[str, Tensor], words: str) -> None:
    path = save({**plain, STRANGERS[words]: torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    refused(path, f"{words}.*Point it at")


def test_parts_that_do_not_belong_together(tmp_path: Path, tiny_dir: Path, plain: dict[str, Tensor]) -> None:
    path = save(plain, tmp_path / "small.safetensors")
    parts = {"clip": tiny_dir / "text_encoder", "t5": tiny_dir / "text_encoder_2", "vae": tiny_dir / "vae"}
    with pytest.raises(
        VortexCheckpointError, match=r"does not fit this transformer, which takes 64 channels and not 128\. Give CLIP's"
    ):
        open_bundle(path, tokenizers=tiny_dir, **parts)


def test_a_vae_whose_groups_nobody_says(tiny_dir: Path) -> None:
    """The miniature's VAE has 8 groups and widths that 32 divides, but a narrower one's would not fit."""
    with pytest.raises(VortexCheckpointError, match=r"do not divide into 32 norm groups.*folder, which does, as `vae`"):
        VaeSpec(channels=(16, 32, 64, 128))


@pytest.mark.parametrize("name", ["flux.safetensors", "flux.gguf"])
def test_a_folder_by_a_files_name(tmp_path: Path, plain: dict[str, Tensor], name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(VortexCheckpointError, match=f"{name} lacks the transformer"):
        open_bundle(folder)
    save(plain, folder / "flux1-schnell.safetensors")
    with pytest.raises(VortexCheckpointError, match=r"perhaps you mean the file flux1-schnell\.safetensors in it"):
        open_bundle(folder)


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder to put things in that the user of this process, if it is root, gives up the right to read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["a file", "its folder"])
def test_no_permission(forbidden: Path, plain: dict[str, Tensor], what: str) -> None:
    folder = forbidden / "models"
    folder.mkdir()
    path = save(plain, folder / "flux1-schnell.safetensors")
    (path if what == "a file" else folder).chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root may read anything
    try:
        refused(path, "may not be read by this user.*Change its permissions")
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "index",
    ["[]", "{", '{"weight_map": 1}', '{"weight_map": {"a": "../../other.safetensors"}}', '{"weight_map": {"a": 1}}'],
)
def test_an_index_that_is_none(tmp_path: Path, plain: dict[str, Tensor], index: str) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save(plain, folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    refused(tmp_path, r"is not an index of shards.*Download it again|is not a file beside it.*Download the model again")


@pytest.mark.parametrize("config", ["[1]", "{}", '{"num_attention_heads": "many"}', "\xff"])
def test_a_config_that_is_none(tmp_path: Path, plain: dict[str, Tensor], config: str) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save(plain, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    refused(tmp_path, r"not JSON|is not a model's config|is another model's, or damaged.*Download it again")


def test_nan_in_a_source_leaves_no_cache(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SMALLEST", 0)
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["single_transformer_blocks.2.proj_out.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(VortexCheckpointError, match=r"single_transformer_blocks\.2\.proj_out\.weight holds NaN"):
        load_flux_schnell(model, device="cpu", cache_dir=tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_a_disk_that_fills_up_while_caching(
    tmp_path: Path, tiny_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes stands in for the disk: the writer gets a real error in the middle of its file."""
    monkeypatch.setattr(cache_module, "SMALLEST", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.warns(VortexWarning, match="could not be kept.*File too large.*\\$VORTEX_CACHE can name"):
            drawn = load_flux_schnell(tiny_dir, device="cpu", cache_dir=tmp_path).generate("a red circle", **DRAW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(drawn, engine.generate("a red circle", **DRAW))
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".lock"]


def test_a_disk_without_room_is_seen_before_any_work(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("vortex_core.nf4.quantize", lambda *a: pytest.fail("quantized for nothing"))
    with pytest.raises(OSError, match=r"0\.0 GB are needed and 0\.0 GB are free") as refusal:
        quantize_file(tiny_dir, tmp_path / "nf4.safetensors", device="cpu")
    assert refusal.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from vortex_core import load_flux_schnell, nf4
from vortex_core.checkpoint import cache
cache.SMALLEST = 0
real, count = nf4.quantize, iter(range(99))
def quantize(*arguments):
    if next(count) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
nf4.quantize = quantize
load_flux_schnell("tiny", device="cpu", cache_dir=sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_killed_while_caching(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*.part"))
    assert not Cache(tmp_path).entries()
    assert not list(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr(cache_module, "SMALLEST", 0)
    loaded = load_flux_schnell("tiny", device="cpu", cache_dir=tmp_path)
    assert torch.equal(loaded.generate("a red circle", **DRAW), engine.generate("a red circle", **DRAW))
    assert not list(tmp_path.glob(".*.part"))
    assert len(Cache(tmp_path).entries()) == 2


def test_a_damaged_entry_is_made_again(
    tmp_path: Path, tiny_dir: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut can leave: a whole name with half a file."""
    monkeypatch.setattr(cache_module, "SMALLEST", 0)
    load_flux_schnell(tiny_dir, device="cpu", cache_dir=tmp_path)
    for entry in Cache(tmp_path).entries():
        entry.path.write_bytes(entry.path.read_bytes()[:-1000])
    loaded = load_flux_schnell(tiny_dir, device="cpu", cache_dir=tmp_path)
    assert torch.equal(loaded.generate("a red circle", **DRAW), engine.generate("a red circle", **DRAW))
    assert not any(differs for _, differs in Cache(tmp_path).damaged())


@pytest.mark.gpu
def test_a_refusal_takes_no_vram(tmp_path: Path, tiny_dir: Path) -> None:
    path = quantize_file(tiny_dir, tmp_path / "nf4.safetensors", device="cpu")
    tensors = load_file(path)
    tensors["single_blocks.2.linear2.weight.absmax"][5] = torch.nan
    save(tensors, path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts = {"clip": tiny_dir / "text_encoder", "t5": tiny_dir / "text_encoder_2", "vae": tiny_dir / "vae"}
    with pytest.raises(VortexCheckpointError, match=r"linear2\.weight\.absmax holds NaN"):
        load_flux_schnell(path, device="cuda", tokenizers=tiny_dir, **parts)
    assert torch.cuda.max_memory_allocated() - before < 1_000_000  # the backend decodes a sample of 512 values
