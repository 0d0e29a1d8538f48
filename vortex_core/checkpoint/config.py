"""A part's sizes, from its tensors and the config beside them. A config is only data.

The headers have the widths and depths. The config adds what they cannot tell (heads of CLIP, groups and scale of the
VAE) and must agree in the rest. Keys that are not listed here are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import VortexCheckpointError, quoted
from ..flux1.spec import ClipSpec, FluxSpec, T5Spec, VaeSpec, dev_checkpoint_message
from ..storage.strict_json import unambiguous
from ..storage.tensors import Tensors
from ..utils.bounds import Bounds, OneOf, bounds_of

CLIP_HEAD = 64  # channels of a head, in every CLIP text model
LARGEST = 10**6  # bytes of a config.json; the released ones have 2,000


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises `VortexCheckpointError` unless it is a JSON object, not huge, and without double keys."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        config = unambiguous(data)
    except (OSError, ValueError, RecursionError) as error:
        raise VortexCheckpointError(
            f"{path} is missing or not JSON ({error}). Download it again.", path=str(path)
        ) from error
    if not isinstance(config, dict):
        raise VortexCheckpointError(f"{path} is not a model's config. Download it again.", path=str(path))
    return config


def sizes(kind: str, tensors: Tensors, config: Mapping[str, Any] | None = None) -> Any:
    """The `FluxSpec`, `ClipSpec`, `T5Spec` or `VaeSpec` of `tensors` and their `config`, if there is one.

    Raises `VortexCheckpointError` for a number out of bounds, and where the two disagree.
    """
    form = FORMS[kind]
    said = None if config is None else form.read(config)
    found = form.infer(tensors)
    if said is None:
        said = form.alone(found)
    for name, value in said.items():
        if found.get(name, value) != value:
            raise VortexCheckpointError(
                f"its config says {form.keys[name]} {quoted(value)}, and the tensors have {found[name]}. One of "
                "them is another model's, or the download is incomplete: run it again."
            )
    return form.spec(**{**said, **found})


@dataclass(frozen=True, slots=True)
class Form:
    """How to read a part's config: its `keys` by the spec's fields, `optional` fields, bounds of `others`.

    `alone`: the fields to assume where there is no config, from those that the tensors tell.
    """

    spec: type[Any]
    infer: Callable[[Tensors], dict[str, Any]]
    keys: Mapping[str, str]
    optional: tuple[str, ...] = ()
    others: Mapping[str, Bounds] = field(default_factory=dict)
    alone: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda found: {}

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The spec's fields in `config`, within their bounds."""
        if config.get("guidance_embeds") is True:
            raise VortexCheckpointError(dev_checkpoint_message())
        lacking = [key for name, key in self.keys.items() if key not in config and name not in self.optional]
        if lacking:
            raise _damaged(f"it lacks {lacking[0]}")
        bounds = bounds_of(self.spec)
        allowed = {key: bounds[name] for name, key in self.keys.items()} | dict(self.others)
        said = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        for key, values in allowed.items():
            if key in said and said[key] not in values:
                raise _damaged(f"{key} should be {values}, not {quoted(said[key])}")
        return {name: said[key] for name, key in self.keys.items() if key in said}


def _damaged(what: str) -> VortexCheckpointError:
    return VortexCheckpointError(f"its config is another model's, or damaged: {what}. Download it again.")


def infer_flux(tensors: Tensors) -> dict[str, Any]:
    """The transformer's sizes. Raises `VortexCheckpointError` unless the file holds a whole FLUX transformer."""
    hidden, in_channels = _shape(tensors, "img_in.weight", 2)
    (head,) = _shape(tensors, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    return {
        "hidden": hidden,
        "heads": hidden // head,
        "double_blocks": _blocks(tensors, "double_blocks.{}.img_attn.qkv.weight"),
        "single_blocks": _blocks(tensors, "single_blocks.{}.linear1.weight"),
        "in_channels": in_channels,
        "context": _shape(tensors, "txt_in.weight", 2)[1],
        "vec": _shape(tensors, "vector_in.in_layer.weight", 2)[1],
    }


def infer_vae(tensors: Tensors) -> dict[str, Any]:
    """The decoder's sizes, but for latent statistics and groups: FLUX's constants, unless a config has others."""
    return {
        "channels": tuple(_shape(tensors, f"up.{level}.block.0.conv2.weight", 4)[0] for level in range(4)),
        "layers": _blocks(tensors, "up.0.block.{}.conv1.weight") - 1,
        "latent_channels": _shape(tensors, "conv_in.weight", 4)[1],
    }


def infer_clip(tensors: Tensors) -> dict[str, Any]:
    """The sizes of CLIP's text encoder, but for its heads."""
    vocabulary, width = _shape(tensors, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": _blocks(tensors, "encoder.layers.{}.mlp.fc1.weight"),
        "max_position_embeddings": _shape(tensors, "embeddings.position_embedding.weight", 2)[0],
    }


def infer_t5(tensors: Tensors) -> dict[str, Any]:
    """The sizes of T5's encoder. Raises `VortexCheckpointError` for umT5, which has the same names."""
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
    """How many blocks there are. A part with gaps was refused before."""
    return next(i for i in count() if pattern.format(i) not in tensors)


FORMS = {
    "transformer": Form(
        FluxSpec,
        infer_flux,
        {
            "heads": "num_attention_heads",
            "double_blocks": "num_layers",
            "single_blocks": "num_single_layers",
            "in_channels": "in_channels",
            "context": "joint_attention_dim",
            "vec": "pooled_projection_dim",
            "axes": "axes_dims_rope",
        },
        optional=("axes",),
        others={"guidance_embeds": OneOf((False, None)), "patch_size": OneOf((1,))},
    ),
    "clip": Form(
        ClipSpec,
        infer_clip,
        {name: name for name in bounds_of(ClipSpec)},
        optional=("max_position_embeddings", "hidden_act", "layer_norm_eps"),
        alone=lambda found: {"num_attention_heads": found["hidden_size"] // CLIP_HEAD},
    ),
    "t5": Form(
        T5Spec,
        infer_t5,
        {name: name for name in bounds_of(T5Spec)},
        optional=(
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "layer_norm_epsilon",
            "feed_forward_proj",
        ),
        others={"dense_act_fn": OneOf(("gelu_new",))},
    ),
    "vae": Form(
        VaeSpec,
        infer_vae,
        {
            "channels": "block_out_channels",
            "layers": "layers_per_block",
            "latent_channels": "latent_channels",
            "groups": "norm_num_groups",
            "scale": "scaling_factor",
            "shift": "shift_factor",
            "sample_size": "sample_size",
        },
        others={"act_fn": OneOf(("silu", "swish")), "use_post_quant_conv": OneOf((False,))},
    ),
}
