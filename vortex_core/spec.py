"""The numbers that fix a FLUX.1-schnell model: widths, depths and the constants the checkpoint does not carry.

Defaults are the released FLUX.1-schnell. A diffusers folder's config files override the sizes (the bundled
miniature is the same architecture, smaller); what schnell fixes by design is a constant here, not a knob.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import VortexCheckpointError

T5_TOKENS = 256  # schnell's own limit; diffusers' default of 512 is FLUX.1-dev's
CLIP_TOKENS = 77
DEFAULT_STEPS = 4
MAX_STEPS = 8
SIZE_MULTIPLE = 16  # 8x VAE downsampling times 2x2 packing
MIN_SIZE, MAX_SIZE = 64, 2048  # pixels a side
QUANTIZATIONS = ("nf4", "none")
MODES = ("fast", "exact")
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # the sizes in CLIP-L's config.json, and in T5-XXL's
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True, slots=True)
class FluxSpec:
    """Sizes of the transformer, in BFL's terms."""

    hidden: int = 3072
    heads: int = 24
    double_blocks: int = 19
    single_blocks: int = 38
    in_channels: int = 64  # 16 latent channels x 2x2 packing
    context: int = 4096  # width of the T5 embeddings
    vec: int = 768  # width of the pooled CLIP vector
    axes: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if self.hidden != self.heads * sum(self.axes):
            raise VortexCheckpointError(
                f"The transformer's width {self.hidden} should be heads x head size = "
                f"{self.heads} x {sum(self.axes)}; config.json does not describe a FLUX model."
            )
        if self.hidden % 64 or self.context % 64 or self.in_channels % 4:
            raise VortexCheckpointError(
                f"NF4 needs widths divisible by 64; found hidden {self.hidden}, context {self.context}."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads

    @property
    def mlp(self) -> int:
        """Width inside an MLP."""
        return self.hidden * self.mlp_ratio

    @property
    def latent_channels(self) -> int:
        """Channels of an unpacked latent."""
        return self.in_channels // 4

    @property
    def modulation_rows(self) -> int:
        """Vectors of `hidden` that one step's modulation takes: 12 a double block, 3 a single block, 2 at the end."""
        return 12 * self.double_blocks + 3 * self.single_blocks + 2

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> FluxSpec:
        """Read `transformer/config.json`. Raises `VortexCheckpointError` for FLUX.1-dev and for other models."""
        if config.get("guidance_embeds"):
            raise VortexCheckpointError(dev_checkpoint_message())
        heads = int(config["num_attention_heads"])
        return cls(
            hidden=heads * int(config["attention_head_dim"]),
            heads=heads,
            double_blocks=int(config["num_layers"]),
            single_blocks=int(config["num_single_layers"]),
            in_channels=int(config["in_channels"]),
            context=int(config["joint_attention_dim"]),
            vec=int(config["pooled_projection_dim"]),
            axes=tuple(config.get("axes_dims_rope", (16, 56, 56))),
        )


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """Sizes and latent statistics of the VAE decoder."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_channels: int = 16
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159
    sample_size: int = 1024  # the side, in pixels, of the pictures the model was trained on

    def __post_init__(self) -> None:
        if len(self.channels) != 4:
            raise VortexCheckpointError(
                f"FLUX's VAE has four levels (8x downsampling); this one has {len(self.channels)}."
            )
        if any(width % self.groups for width in self.channels):
            raise VortexCheckpointError(
                f"The VAE's widths {self.channels} do not divide into {self.groups} norm groups. A single file does "
                "not say how many it has, so FLUX's 32 are taken: give vae= the VAE's folder, which does."
            )

    @property
    def powers_of_two(self) -> bool:
        """Whether all widths are powers of two from 16 on, as FLUX's are and the fused kernels want them."""
        return all(width >= 16 and width.bit_count() == 1 for width in self.channels)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> VaeSpec:
        """Read `vae/config.json`."""
        return cls(
            channels=tuple(config["block_out_channels"]),
            layers=int(config["layers_per_block"]),
            latent_channels=int(config["latent_channels"]),
            groups=int(config["norm_num_groups"]),
            scale=float(config["scaling_factor"]),
            shift=float(config["shift_factor"]),
            sample_size=int(config["sample_size"]),
        )


def dev_checkpoint_message() -> str:
    """The sentence a FLUX.1-dev checkpoint gets, wherever it is recognised."""
    return (
        "This is a FLUX.1-dev checkpoint, or one made from it, such as Kontext (it has guidance embeddings); Vortex "
        "draws with FLUX.1-schnell, 4 steps and no guidance. Point it at a FLUX.1-schnell model instead."
    )
