"""The model's VAE decoder with the interface of the host's VAE, as its nodes and those of other packs use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from . import engines, host
from .types import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADVICE = "To encode a picture, or to reach the weights, use Load VAE with FLUX's ae.safetensors."
FACTOR = 8  # pixels for each latent
CHANNELS = 16


class Decoder:
    """Decodes with the engine of `model`, which already holds these weights: a second copy would cost VRAM.

    The attributes are those of the host's `comfy.sd.VAE` for FLUX. There is no `first_stage_model` behind them.
    """

    downscale_ratio = upscale_ratio = FACTOR
    latent_channels, latent_dim, output_channels = CHANNELS, 2, 3
    downscale_index_formula = upscale_index_formula = extra_1d_channel = pad_channel_value = size = None
    crop_input = disable_offload = True
    not_video = handles_tiling = False

    def __init__(self, model: Model) -> None:
        import torch

        self.model = model
        self.device, self.output_device = host.device(), torch.device("cpu")
        self.vae_dtype, self.working_dtypes = torch.float32, [torch.float32]  # LATENT samples are fp32

    # ------------------------------------------------------------ decoding

    def decode(self, samples_in: Tensor, vae_options: object = None) -> Tensor:
        """LATENT samples `[B, 16, H/8, W/8]` to IMAGE `[B, H, W, 3]`."""
        from ..vortex_core.device.finite_pictures import check_finite
        from ..vortex_core.flux1.request import check_latents

        check_latents(samples_in, CHANNELS)
        with engines.torchs_own_memory_errors():
            pictures = engines.acquire(self.model).decode(host.from_native(samples_in)).cpu()
        check_finite(pictures, "The picture of these latents")
        return pictures

    def decode_tiled(self, samples: Tensor, *tiles: object, **tiling: object) -> Tensor:
        """Decode without tiles: the engine keeps its budget anyway, and tiles would change the picture."""
        return self.decode(samples)

    decode_tiled_ = decode_tiled

    # ------------------------------------------------------------ encoding is refused

    def encode(self, *pixels: object, **options: object) -> NoReturn:
        """Raise `VortexError`: the engine has no encoder."""
        from ..vortex_core.errors import VortexError

        raise VortexError(f"Vortex's VAE only decodes. {ADVICE}")

    encode_tiled = encode_tiled_ = get_sd = encode

    # ------------------------------------------------------------ what the host asks

    def vae_output_dtype(self) -> torch.dtype:
        """The type of pictures."""
        return self.vae_dtype

    @property
    def patcher(self) -> Any:
        """The stand-in of the engine, which holds these weights, in the host's list of loaded models."""
        return engines.patcher(self.model)

    def model_size(self) -> int:
        """Bytes that the host frees when it moves the model away."""
        return int(self.patcher.model_size())

    def memory_used_decode(self, shape: tuple[int, ...], dtype: object = None) -> int:
        """Bytes that the host should free before decoding: none, the engine's budget includes them."""
        return 0

    memory_used_encode = memory_used_decode

    def prepare_decode(self, sample_shape: tuple[int, ...], memory_required: int | None = None) -> int:
        """Make the model resident. Returns how many pictures are decoded at once."""
        engines.acquire(self.model)
        return 1

    def throw_exception_if_invalid(self) -> None:
        """Do nothing: it is valid."""

    def is_dynamic(self) -> bool:
        """Weights move as a whole."""
        return False

    def spacial_compression_decode(self) -> int:
        """Pixels for each latent."""
        return FACTOR

    spacial_compression_encode = spacial_compression_decode

    def temporal_compression_decode(self) -> None:
        """None: there are no frames."""

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """IMAGE `[B, H, W, C]` cut in the middle to multiples of 8, as the host does before it encodes."""
        for dim in (1, 2):
            size = pixels.shape[dim] // FACTOR * FACTOR
            pixels = pixels.narrow(dim, (pixels.shape[dim] - size) // 2, size)
        return pixels[..., : self.output_channels]

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Vortex's VAE has no {name}. {ADVICE}", name=name, obj=self)
