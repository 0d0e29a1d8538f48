"""Sizes read off the tensors themselves, for files that carry no config."""

from __future__ import annotations

from itertools import count
from typing import Any

from ..errors import VortexCheckpointError
from ..spec import FluxSpec, VaeSpec
from .tensors import Tensors

CLIP_HEAD = 64  # channels of a head, in every CLIP text model


def infer_flux(tensors: Tensors) -> FluxSpec:
    """The transformer's sizes. Raises `VortexCheckpointError` where the file is not a whole FLUX transformer."""
    hidden, in_channels = _shape(tensors, "img_in.weight", 2)
    (head,) = _shape(tensors, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    return FluxSpec(
        hidden=hidden,
        heads=hidden // head,
        double_blocks=_blocks(tensors, "double_blocks.{}.img_attn.qkv.weight"),
        single_blocks=_blocks(tensors, "single_blocks.{}.linear1.weight"),
        in_channels=in_channels,
        context=_shape(tensors, "txt_in.weight", 2)[1],
        vec=_shape(tensors, "vector_in.in_layer.weight", 2)[1],
    )


def infer_vae(tensors: Tensors) -> VaeSpec:
    """The decoder's sizes; latent statistics and groups are FLUX's constants."""
    return VaeSpec(
        channels=tuple(_shape(tensors, f"up.{level}.block.0.conv2.weight", 4)[0] for level in range(4)),
        layers=_blocks(tensors, "up.0.block.{}.conv1.weight") - 1,
        latent_channels=_shape(tensors, "conv_in.weight", 4)[1],
    )


def infer_clip(tensors: Tensors) -> dict[str, Any]:
    """A config for transformers' CLIP text model, but for `eos_token_id`, which only the tokenizer knows."""
    vocabulary, width = _shape(tensors, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _blocks(tensors, "encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": width // CLIP_HEAD,
        "max_position_embeddings": _shape(tensors, "embeddings.position_embedding.weight", 2)[0],
        "hidden_act": "quick_gelu",
    }


def infer_t5(tensors: Tensors) -> dict[str, Any]:
    """A config for transformers' T5 encoder. Raises `VortexCheckpointError` for umT5, which has the same names."""
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in tensors:
        raise VortexCheckpointError(f"{tensors.where} is a umT5 encoder; FLUX takes T5-XXL.", path=tensors.where)
    vocabulary, width = _shape(tensors, "shared.weight", 2)
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = _shape(tensors, first + "relative_attention_bias.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _shape(tensors, first + "q.weight", 2)[0] // heads,
        "d_ff": _shape(tensors, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": _blocks(tensors, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _shape(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in tensors:
        raise VortexCheckpointError(
            f"{tensors.where} lacks {name}. It is another model, or the download is incomplete: run it again.",
            path=tensors.where,
        )
    shape = tensors.shape(name)
    if len(shape) != dimensions or 0 in shape:
        raise VortexCheckpointError(
            f"{tensors.where}: {name} is {shape}, which cannot be. The file is damaged; download it again.",
            path=tensors.where,
        )
    return shape


def _blocks(tensors: Tensors, pattern: str) -> int:
    return next(i for i in count() if pattern.format(i) not in tensors)
