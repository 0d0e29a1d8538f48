"""FLUX.1-schnell at its real size with random weights, as a diffusers pipeline.

Speed and memory do not depend on what is drawn.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoint.bundle import TINY

if TYPE_CHECKING:
    from diffusers import FluxPipeline

SIZES: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
        "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 1024,
    },
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "vocab_size": 49408,
    },
    "text_encoder_2": {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    },
}  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """The miniature's config files with the released model's sizes."""
    return {part: json.loads((TINY / part / "config.json").read_text()) | sizes for part, sizes in SIZES.items()}


def modules(config: dict[str, dict[str, Any]]) -> dict[str, nn.Module]:
    """Each part as diffusers' or transformers' own class, on `meta`: names and shapes do not come from Vortex."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel.from_config(config["transformer"]),
            "vae": AutoencoderKL.from_config(config["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(config["text_encoder"])),
            "text_encoder_2": T5EncoderModel(T5Config.from_dict(config["text_encoder_2"])),
        }


def random_pipeline(device: torch.device, seed: int = 0) -> FluxPipeline:
    """A pipeline in bf16: transformer and VAE on `device`, text encoders in host memory.

    Tokenizers and scheduler are the miniature's. Weights are drawn so that values keep their size from layer to layer:
    variance 1 / fan-in, norms 1.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    parts = modules(configs())
    generator = torch.Generator(device).manual_seed(seed)
    for part, module in parts.items():
        module.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.shape[-1], device=device))
            elif tensor.ndim < 2:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        if part.startswith("text_encoder"):
            module.to("cpu")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "scheduler"),
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(TINY / "tokenizer_2"),
        **parts,
    )
