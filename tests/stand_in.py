"""Small files that stand for the large ones people have: the miniature's weights under their names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vortex_core.checkpoint.bundle import open_bundle
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.transformer import Transformer
from vortex_core.flux1.vae import Decoder
from vortex_core.flux1.vae_encoder import Encoder

VOCABULARIES = {"clip": 49408, "t5": 32128}  # of the released encoders


def transformer(folder: Path) -> dict[str, Tensor]:
    """BFL's names."""
    bundle = open_bundle(folder)
    with torch.device("meta"):
        modules = (Transformer(bundle.spec.flux), Modulation(bundle.spec.flux))
    names = [name for module in modules for name, _ in module.named_parameters()]
    return {name: bundle.parts["transformer"].tensors.read(name).contiguous() for name in names}


def encoder(folder: Path, kind: str) -> dict[str, Tensor]:
    """`clip` or `t5` under transformers' names, with rows for as many tokens as the released encoder has."""
    subfolder, table = {
        "clip": ("text_encoder", "embeddings.token_embedding.weight"),
        "t5": ("text_encoder_2", "shared.weight"),
    }[kind]
    tensors = load_file(folder / subfolder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(table))
    rows = torch.randn(VOCABULARIES[kind], tensors[name].shape[1], generator=torch.Generator().manual_seed(0))
    tensors[name] = rows.to(tensors[name].dtype)
    if kind == "clip":
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return tensors


def vae(folder: Path, *, encoder: bool = True) -> dict[str, Tensor]:
    """The decoder under BFL's names, and the encoder; attention's weights are 1 x 1 convolutions, as BFL has them."""
    bundle = open_bundle(folder)
    with torch.device("meta"):
        halves = {"decoder.": ("", Decoder(bundle.spec.vae)), "encoder.": ("encoder.", Encoder(bundle.spec.vae))}
    vae, found = bundle.parts["vae"].tensors, {}
    for prefix, (canonical, half) in halves.items():
        for name, _ in half.named_parameters():
            tensor = vae.read(canonical + name).contiguous()
            linear = ".attn_1." in name and tensor.ndim == 2
            found[prefix + name] = tensor[:, :, None, None] if linear else tensor
    return {name: tensor for name, tensor in found.items() if encoder or name.startswith("decoder.")}


def write_parts(folder: Path, models: Path) -> None:
    """Transformer, encoders and VAE apart, where ComfyUI's own loaders look for them."""
    for path, tensors in {
        "diffusion_models/flux1-schnell.safetensors": transformer(folder),
        "text_encoders/clip_l.safetensors": encoder(folder, "clip"),
        "clip/t5xxl_fp16.safetensors": encoder(folder, "t5"),
        "vae/ae.safetensors": vae(folder),
    }.items():
        (models / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, models / path)


def write_checkpoint(folder: Path, path: Path) -> None:
    """Everything in one file, fp8, as `checkpoints/flux1-schnell-fp8.safetensors` is."""
    prefixes = {
        "model.diffusion_model.": transformer(folder),
        "text_encoders.clip_l.transformer.": encoder(folder, "clip"),
        "text_encoders.t5xxl.transformer.": encoder(folder, "t5"),
    }
    tensors = {}
    for prefix, part in prefixes.items():
        tensors |= {prefix + name: tensor.to(torch.float8_e4m3fn) for name, tensor in part.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {f"vae.{name}": tensor for name, tensor in vae(folder).items()}, path)
