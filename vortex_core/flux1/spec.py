"""The numbers that fix a FLUX.1-schnell model: widths, depths and the constants that no checkpoint carries.

Defaults are those of the released FLUX.1-schnell. Config files of a diffusers folder override the sizes: the bundled
miniature has the same architecture and is smaller. What schnell fixes by design is a constant here, not an option.
Every field has bounds, which are checked before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import VortexCheckpointError
from ..utils.bounds import OneOf, Real, Several, Whole, check_fields, within

T5_TOKENS = 256  # schnell's own limit; diffusers' default of 512 is FLUX.1-dev's
CLIP_TOKENS = 77
DEFAULT_STEPS = 4
MAX_STEPS = 8
SIZE_MULTIPLE = 16  # 8x VAE downsampling times 2x2 packing
MIN_SIZE, MAX_SIZE = 64, 2048  # pixels a side
QUANTIZATIONS = ("nf4", "none")
MOST_BUDGET = 10**6  # GB; more than any card has, and small enough for the bytes to be an int of 64 bits
MODES = ("fast", "exact", "int8", "fp8")
MODULATION_ROWS = {
    "double_blocks": {"img_mod.lin": 6, "txt_mod.lin": 6},  # shift, scale, gate of attention, then of the MLP
    "single_blocks": {"modulation.lin": 3},  # shift, scale, gate
    "final_layer": {"adaLN_modulation.1": 2},  # shift, scale
}  # vectors of `hidden` that each modulation linear gives, in the order of the table
DOUBLE_ROWS, SINGLE_ROWS, FINAL_ROWS = (sum(linears.values()) for linears in MODULATION_ROWS.values())
WIDTHS = Whole(1, 2**16)
LAYERS = Whole(1, 256)
VOCABULARY = Whole(2, 2**20)
EPSILON = Real(1e-12, 1e-2)


@dataclass(frozen=True, slots=True)
class FluxSpec:
    """Sizes of the transformer, in BFL's terms."""

    hidden: int = within(3072, WIDTHS)
    heads: int = within(24, Whole(1, 512))
    double_blocks: int = within(19, LAYERS)
    single_blocks: int = within(38, LAYERS)
    in_channels: int = within(64, Whole(4, 1024, by=4))  # 16 latent channels x 2x2 packing
    context: int = within(4096, WIDTHS)  # width of the T5 embeddings
    vec: int = within(768, WIDTHS)  # width of the pooled CLIP vector
    axes: tuple[int, ...] = within((16, 56, 56), Several(Whole(2, 512, by=2), 3))
    theta: int = within(10_000, Whole(1, 10**6))
    mlp_ratio: int = within(4, Whole(1, 16))

    def __post_init__(self) -> None:
        check_fields(self, "The transformer")
        if self.hidden != self.heads * sum(self.axes):
            raise VortexCheckpointError(
                f"The transformer's width {self.hidden} should be heads x head size = "
                f"{self.heads} x {sum(self.axes)}; config.json does not describe a FLUX model."
            )
        if self.hidden % 64 or self.context % 64:
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
        """Vectors of `hidden` in one step's modulation table."""
        return DOUBLE_ROWS * self.double_blocks + SINGLE_ROWS * self.single_blocks + FINAL_ROWS


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """Sizes and latent statistics of the VAE decoder."""

    channels: tuple[int, ...] = within((128, 256, 512, 512), Several(Whole(1, 2**14), 4))  # a level, 8x downsampling
    layers: int = within(2, Whole(1, 32))
    latent_channels: int = within(16, Whole(1, 256))
    groups: int = within(32, Whole(1, 512))
    scale: float = within(0.3611, Real(1e-3, 1e3))
    shift: float = within(0.1159, Real(-1e3, 1e3))
    # side in pixels of the pictures that the model was trained on
    sample_size: int = within(1024, Whole(MIN_SIZE, MAX_SIZE, by=SIZE_MULTIPLE))

    def __post_init__(self) -> None:
        check_fields(self, "The VAE")
        if any(width % self.groups for width in self.channels):
            raise VortexCheckpointError(
                f"The VAE's widths {self.channels} do not divide into {self.groups} norm groups. A single file does "
                "not say how many it has, so FLUX's 32 are taken: give the VAE's folder, which does, as `vae`."
            )

    @property
    def powers_of_two(self) -> bool:
        """Whether all widths are powers of two from 16 on. FLUX's are; the fused kernels need it."""
        return all(width >= 16 and width.bit_count() == 1 for width in self.channels)


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """Sizes of CLIP's text encoder, under the names of transformers; the defaults are CLIP-L's."""

    vocab_size: int = within(49408, VOCABULARY)
    hidden_size: int = within(768, WIDTHS)
    intermediate_size: int = within(3072, WIDTHS)
    num_hidden_layers: int = within(12, LAYERS)
    num_attention_heads: int = within(12, Whole(1, 512))
    max_position_embeddings: int = within(CLIP_TOKENS, Whole(CLIP_TOKENS, 2**16))
    hidden_act: str = within("quick_gelu", OneOf(("quick_gelu", "gelu")))
    layer_norm_eps: float = within(1e-5, EPSILON)

    def __post_init__(self) -> None:
        check_fields(self, "CLIP")
        if self.hidden_size % self.num_attention_heads:
            raise VortexCheckpointError(
                f"CLIP's width {self.hidden_size} does not divide into {self.num_attention_heads} heads."
            )


@dataclass(frozen=True, slots=True)
class T5Spec:
    """Sizes of T5's encoder, under the names of transformers; the defaults are T5-XXL's."""

    vocab_size: int = within(32128, VOCABULARY)
    d_model: int = within(4096, WIDTHS)
    d_kv: int = within(64, WIDTHS)
    d_ff: int = within(10240, WIDTHS)
    num_layers: int = within(24, LAYERS)
    num_heads: int = within(64, Whole(1, 512))
    relative_attention_num_buckets: int = within(32, Whole(4, 64))
    relative_attention_max_distance: int = within(128, Whole(64, 4096))
    layer_norm_epsilon: float = within(1e-6, EPSILON)
    feed_forward_proj: str = within("gated-gelu", OneOf(("gated-gelu",)))

    def __post_init__(self) -> None:
        check_fields(self, "T5")
        widths = (self.d_model, self.d_ff, self.d_kv * self.num_heads)
        if any(width % 64 for width in widths):
            raise VortexCheckpointError(f"NF4 needs widths divisible by 64; T5's are {widths}.")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of all parts of a model; the defaults are those of the released FLUX.1-schnell."""

    flux: FluxSpec = FluxSpec()
    vae: VaeSpec = VaeSpec()
    clip: ClipSpec = ClipSpec()
    t5: T5Spec = T5Spec()


def dev_checkpoint_message() -> str:
    """The error message for a FLUX.1-dev checkpoint, for every place that recognises one."""
    return (
        "This is a FLUX.1-dev checkpoint, or one made from it, such as Kontext (it has guidance embeddings); Vortex "
        "draws with FLUX.1-schnell, 4 steps and no guidance. Point it at a FLUX.1-schnell model instead."
    )
