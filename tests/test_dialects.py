"""Every file people have, written by its real writers where they run here, gives the same canonical tensors."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from specimens import write_gguf
from torch import Tensor, nn

from vortex_core import Engine, VortexCheckpointError, load_flux_schnell, nf4
from vortex_core.checkpoint.bundle import Bundle, open_bundle
from vortex_core.checkpoint.dialects import find_part
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.transformer import Transformer
from vortex_core.storage.files import StateDict, open_file
from vortex_core.storage.materialize import is_quantized

WEIGHTS = "diffusion_pytorch_model.safetensors"
DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def bundle(tiny_dir: Path) -> Bundle:
    return open_bundle(tiny_dir)


@pytest.fixture(scope="module")
def canonical(bundle: Bundle) -> dict[str, Tensor]:
    """The miniature's transformer under BFL's names, as a single file has it."""
    with torch.device("meta"):
        modules = (Transformer(bundle.spec.flux), Modulation(bundle.spec.flux))
    names = [name for module in modules for name, _ in module.named_parameters()]
    return {name: bundle.parts["transformer"].tensors.read(name).contiguous() for name in names}


@pytest.fixture(scope="module")
def linears(bundle: Bundle) -> set[str]:
    with torch.device("meta"):
        modules = (Transformer(bundle.spec.flux), Modulation(bundle.spec.flux))
    named = [pair for module in modules for pair in module.named_modules()]
    return {f"{name}.weight" for name, part in named if isinstance(part, nn.Linear) and is_quantized(part, name)}


def bitsandbytes_state(weight: Tensor, name: str, *, nested: bool) -> dict[str, Tensor]:
    """A weight as bitsandbytes' own state dict packs it."""
    packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    parts = {name: packed}
    parts |= {f"{name}.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()}
    return parts


def parts_of(tiny_dir: Path) -> dict[str, Path]:
    return {"clip": tiny_dir / "text_encoder", "t5": tiny_dir / "text_encoder_2", "vae": tiny_dir / "vae"}


def draw(model: Path, tiny_dir: Path, **options: object) -> Tensor:
    with load_flux_schnell(model, device="cpu", tokenizers=tiny_dir, **parts_of(tiny_dir), **options) as engine:
        return engine.generate(PROMPT, **DRAW)


def words(path: Path) -> str:
    part = find_part(open_file(path), "transformer")
    assert part is not None
    return part.words


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_bfl_single_file(
    tmp_path: Path, tiny_dir: Path, engine: Engine, canonical: dict[str, Tensor], prefix: str
) -> None:
    path = tmp_path / "flux1-schnell.safetensors"
    save_file({prefix + name: tensor for name, tensor in canonical.items()}, path)
    assert words(path) == "BFL names, bf16"
    assert open_bundle(path, tokenizers=tiny_dir, **parts_of(tiny_dir)).spec == open_bundle(tiny_dir).spec
    assert torch.equal(draw(path, tiny_dir), engine.generate(PROMPT, **DRAW))


def test_one_file_with_everything(tmp_path: Path, tiny_dir: Path, engine: Engine, canonical: dict[str, Tensor]) -> None:
    """The bundled kind: transformer, T5, CLIP and VAE under ComfyUI's prefixes; sizes are read off the tensors."""
    clip = load_file(tiny_dir / "text_encoder" / "model.safetensors")
    t5 = load_file(tiny_dir / "text_encoder_2" / "model.safetensors")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in canonical.items()}
    tensors |= {
        f"text_encoders.clip_l.transformer.text_model.{n.removeprefix('text_model.')}": t for n, t in clip.items()
    }
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5.items()}
    vae = load_file(tiny_dir / "vae" / WEIGHTS)
    tensors |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    path = tmp_path / "bundled.safetensors"
    save_file(tensors, path)
    found = open_bundle(path, tokenizers=tiny_dir)
    config = json.loads((tiny_dir / "vae" / "config.json").read_text())
    assert found.spec.vae.channels == tuple(config["block_out_channels"])
    assert found.spec.vae.layers == config["layers_per_block"]
    # a file does not say how many groups a norm has, and FLUX's 32 are not the miniature's: take that VAE's folder
    with load_flux_schnell(path, device="cpu", tokenizers=tiny_dir, vae=tiny_dir / "vae") as whole:
        assert torch.equal(whole.generate(PROMPT, **DRAW), engine.generate(PROMPT, **DRAW))


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_as_bitsandbytes_writes_it(
    tmp_path: Path, tiny_dir: Path, canonical: dict[str, Tensor], linears: set[str], nested: bool
) -> None:
    state: dict[str, Tensor] = {}
    for name, tensor in canonical.items():
        state |= bitsandbytes_state(tensor, name, nested=nested) if name in linears else {name: tensor}
    # as any shape of as many values
    state = {name: t.view(-1, 1) if name.endswith("nested_quant_map") else t for name, t in state.items()}
    path = tmp_path / "nf4.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, path)
    assert words(path) == f"BFL names, NF4{' with nested scales' if nested else ''}"
    part = find_part(open_file(path), "transformer")
    assert part is not None
    assert part.is_nf4
    for name in sorted(linears):
        packed, reference = bnb.quantize_4bit(
            canonical[name].float(), blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        ours = part.tensors.read_nf4(name)
        assert ours is not None
        assert torch.equal(ours.packed.flatten(), packed.flatten())
        assert torch.equal(part.tensors.read(name), bnb.dequantize_4bit(packed, reference))
    assert draw(path, tiny_dir).isfinite().all()


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_in_diffusers_layout_joins_bit_for_bit(tiny_dir: Path, linears: set[str], nested: bool) -> None:
    source = load_file(tiny_dir / "transformer" / WEIGHTS)
    state: dict[str, Tensor] = {}
    for name, tensor in source.items():
        is_linear = tensor.ndim == 2
        state |= bitsandbytes_state(tensor, name, nested=nested) if is_linear else {name: tensor}
    part = find_part(StateDict(state, "a state dict"), "transformer")
    whole = find_part(StateDict(source, "a state dict"), "transformer")
    assert part is not None
    assert whole is not None
    assert part.words == f"diffusers names, NF4{' with nested scales' if nested else ''}"
    for name in sorted(linears):
        ours = part.tensors.read_nf4(name)
        assert ours is not None
        if not nested:  # quantizing rows apart or together is the same: blocks never cross rows
            together = nf4.quantize(whole.tensors.read(name))
            assert torch.equal(ours.packed, together.packed)
            assert torch.equal(ours.absmax, together.absmax)
        assert torch.equal(nf4.dequantize(ours, torch.float32), part.tensors.read(name))
    # x_embedder is packed too in such files, and is wanted plain
    assert part.tensors.read("img_in.weight").shape == source["x_embedder.weight"].shape


@pytest.mark.parametrize("scale_name", [None, "scale_weight", "weight_scale"])
def test_fp8(tmp_path: Path, canonical: dict[str, Tensor], linears: set[str], scale_name: str | None) -> None:
    tensors: dict[str, Tensor] = {}
    for name, tensor in canonical.items():
        if name not in linears:
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448 if scale_name else torch.tensor(1.0)
        tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        if scale_name:
            tensors[f"{name.removesuffix('.weight')}.{scale_name}"] = scale
    if scale_name:
        tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    path = tmp_path / "fp8.safetensors"
    save_file(tensors, path)
    assert words(path) == f"BFL names, fp8 e4m3{' scaled' if scale_name else ''}"
    part = find_part(open_file(path), "transformer")
    assert part is not None
    for name in sorted(linears):
        expected = tensors[name].float()
        if scale_name:
            expected = expected * tensors[f"{name.removesuffix('.weight')}.{scale_name}"]
        assert torch.equal(part.tensors.read(name).float(), expected)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_gguf(tmp_path: Path, tiny_dir: Path, canonical: dict[str, Tensor], linears: set[str], kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "flux.gguf"
    quantization = gguf.GGMLQuantizationType[kind]
    tensors, expected = {}, {}
    for name, tensor in canonical.items():
        values = tensor.float().numpy()
        if name in linears:
            data = gguf.quantize(values, quantization)
            expected[name] = torch.from_numpy(gguf.dequantize(data, quantization).copy())
            tensors[name] = data, quantization
        else:
            tensors[name] = values, None
    write_gguf(path, "flux", tensors)
    assert words(path) == f"BFL names, GGUF {kind}"
    part = find_part(open_file(path), "transformer")
    assert part is not None
    for name in sorted(linears):
        assert torch.equal(part.tensors.read(name), expected[name])
        assert part.tensors.shape(name) == tuple(canonical[name].shape)
    assert draw(path, tiny_dir).isfinite().all()


def test_text_encoders_and_vae_as_single_files(tmp_path: Path, tiny_dir: Path, engine: Engine) -> None:
    clip = tmp_path / "clip_l.safetensors"
    t5 = tmp_path / "t5xxl.safetensors"
    clip.write_bytes((tiny_dir / "text_encoder" / "model.safetensors").read_bytes())
    t5.write_bytes((tiny_dir / "text_encoder_2" / "model.safetensors").read_bytes())
    with load_flux_schnell(tiny_dir, device="cpu", clip=clip, t5=t5) as other:
        assert torch.equal(other.generate(PROMPT, **DRAW), engine.generate(PROMPT, **DRAW))
    with pytest.raises(VortexCheckpointError, match=r"clip_l\.safetensors does not hold the T5 encoder"):
        open_bundle(tiny_dir, t5=clip)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_t5_as_gguf(tmp_path: Path, tiny_dir: Path, engine: Engine, kind: str) -> None:
    """Under llama.cpp's names, which the `gguf` package itself gives."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "t5-v1_1-xxl-encoder.gguf"
    tensors = load_file(tiny_dir / "text_encoder_2" / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 3)
    quantization = gguf.GGMLQuantizationType[kind]
    renamed = {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        theirs = names.get_name(name, try_suffixes=(".weight",)) or "token_embd.weight"
        is_linear = tensor.ndim == 2 and "relative" not in name
        renamed[theirs] = (gguf.quantize(values, quantization), quantization) if is_linear else (values, None)
    write_gguf(path, "t5encoder", renamed)
    part = find_part(open_file(path), "t5")
    assert part is not None
    assert part.words == f"llama.cpp names, GGUF {kind}"
    for name, tensor in tensors.items():
        error = (part.tensors.read(name) - tensor.float()).abs().max() / tensor.float().abs().max()
        assert error <= (0 if kind == "F32" else 1 / 200)
    with load_flux_schnell(tiny_dir, device="cpu", t5=path) as other:
        drawn, expected = other.generate(PROMPT, **DRAW), engine.generate(PROMPT, **DRAW)
    assert torch.equal(drawn, expected) if kind == "F32" else (drawn - expected).abs().mean() < 0.1


def test_what_a_file_lacks_is_said(tmp_path: Path, tiny_dir: Path, canonical: dict[str, Tensor]) -> None:
    path = tmp_path / "unet.safetensors"
    save_file(canonical, path)
    with pytest.raises(VortexCheckpointError, match=r"lacks CLIP.*T5.*the VAE.*`clip`, `t5`, `vae`"):
        open_bundle(path)
    with pytest.raises(VortexCheckpointError, match="vortex fetch tokenizers"):
        open_bundle(path, **parts_of(tiny_dir))


def test_other_four_bit_formats_are_refused(canonical: dict[str, Tensor]) -> None:
    name = "double_blocks.0.img_attn.qkv.weight"
    state = bitsandbytes_state(canonical[name], name, nested=False)
    key = f"{name}.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(state[key].tolist())) | {"blocksize": 128}
    state[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    with pytest.raises(VortexCheckpointError, match="blocks of 128; Vortex reads nf4 with blocks of 64"):
        find_part(StateDict(state, "a file"), "transformer")
    fp4 = {name: state[name], f"{name}.quant_state.bitsandbytes__fp4": state[key]}
    with pytest.raises(VortexCheckpointError, match="is in FP4 of bitsandbytes"):
        find_part(StateDict(fp4, "a file"), "transformer")


@pytest.mark.parametrize("file", ["flux.gguf", "flux.txt"])
def test_files_that_are_nothing(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"nothing at all, but long enough to hold a header of some kind")
    with pytest.raises(VortexCheckpointError, match=r"not a readable GGUF file|neither \.safetensors nor \.gguf"):
        open_bundle(tmp_path / file)
