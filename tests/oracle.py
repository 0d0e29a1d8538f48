"""diffusers as the oracle: its modules carrying exactly the weights that Vortex decoded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from engine_parts import painter_of
from torch import Tensor, nn

from vortex_core import Engine
from vortex_core.checkpoint.key_maps import flux_sources
from vortex_core.nf4 import NF4Weight, dequantize
from vortex_core.quant.linear import NF4Linear


def decoded(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module in fp32, NF4 decoded."""
    tensors = {name: parameter.float() for name, parameter in module.named_parameters()}
    for name, part in module.named_modules():
        if isinstance(part, NF4Linear):
            tensors[f"{name}.weight"] = dequantize(NF4Weight(part.packed, part.absmax), torch.float32)
            if part.bias is not None:
                tensors[f"{name}.bias"] = part.bias.float()
    return tensors


def diffusers_transformer(engine: Engine, folder: Path) -> FluxTransformer2DModel:
    """diffusers' transformer in fp32 with the engine's weights, split as diffusers has them."""
    theirs = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder / "transformer"))
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    state = {}
    for name, tensor in {
        **decoded(painter_of(engine).model.transformer),
        **decoded(painter_of(engine).conditioner.modulation),
    }.items():
        sources = flux_sources(name)
        if name.startswith("final_layer.adaLN"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        state.update(zip(sources, tensor.split([shapes[source][0] for source in sources]), strict=True))
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def diffusers_pipeline(engine: Engine, folder: Path) -> FluxPipeline:
    """A whole fp32 pipeline with the engine's weights in transformer and T5."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = diffusers_transformer(engine, folder)
    blocks = {f"encoder.block.{k}": v for k, v in decoded(painter_of(engine).conditioner.t5._model.block).items()}
    missing, unexpected = pipe.text_encoder_2.load_state_dict(blocks, strict=False)
    assert not unexpected
    assert not any("block" in name for name in missing)
    return pipe


def diffusers_vae(folder: Path) -> AutoencoderKL:
    """diffusers' VAE in fp32."""
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval()
