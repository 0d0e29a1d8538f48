"""The model's VAE as the host's own, as its nodes and those of other packs use it: both directions by the engine.

`Decoder` has what a VAE is asked for. `vae_of` makes it an instance of the host's `comfy.sd.VAE`, too. Pictures are
never cut into tiles where the engine takes them whole: it keeps its budget anyway, and tiles would change the picture.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from . import engines, host
from .types import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADVICE = "To reach the weights of a VAE, use Load VAE with FLUX's ae.safetensors."
FACTOR = 8  # pixels for each latent
CHANNELS = 16


def vae_of(model: Model) -> Decoder:
    """The VAE of a handle: the host's kind, where there is such a class."""
    return _kind()(model)


@cache
def _kind() -> type[Decoder]:
    try:
        from comfy.sd import VAE
    except (ImportError, AttributeError):
        return Decoder
    return type("VortexVAE", (Decoder, VAE), {})


class Decoder:
    """Decodes and encodes with the engine of `model`, which already holds these weights: a second copy would cost VRAM.

    The attributes are those of the host's `comfy.sd.VAE` for FLUX, whose `__init__` is not called: it wants weights.
    Samples are in the host's scale, which is the VAE's own. `first_stage_model` has no weights.
    """

    downscale_ratio = upscale_ratio = FACTOR
    latent_channels, latent_dim, output_channels = CHANNELS, 2, 3
    downscale_index_formula = upscale_index_formula = extra_1d_channel = pad_channel_value = size = None
    format_encoded = None
    crop_input = disable_offload = True
    not_video = handles_tiling = False

    def __init__(self, model: Model) -> None:
        import torch

        self.model = model
        self.device, self.output_device = host.device(), host.intermediate_device()
        self.vae_dtype, self.working_dtypes = torch.float32, [torch.float32]  # LATENT samples are fp32
        self.first_stage_model = first_stage_of(model)

    # ------------------------------------------------------------ decoding

    def decode(self, samples_in: Tensor, vae_options: object = None) -> Tensor:
        """LATENT samples `[B, 16, H/8, W/8]` to IMAGE `[B, H, W, 3]`."""
        from ..vortex_core.device.finite_pictures import check_finite

        samples = samples_in[:, :, 0] if samples_in.ndim == 5 else samples_in  # of one frame
        pictures = decoded(self.model, samples).to(self.output_device, self.vae_output_dtype())
        check_finite(pictures, "The picture of these latents")
        return pictures

    def decode_tiled(self, samples: Tensor, *tiles: object, **tiling: object) -> Tensor:
        """Decode without tiles."""
        return self.decode(samples)

    # ------------------------------------------------------------ encoding

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """IMAGE `[B, H, W, C]`, cut to multiples of 8, to LATENT samples `[B, 16, H/8, W/8]`: the mode, as the host's.

        Pictures that are larger than the engine takes are encoded in the host's tiles.
        """
        from ..vortex_core.flux1.start import MOST_PIXELS

        pixels = self.vae_encode_crop_pixels(pixel_samples)
        if pixels.shape[1] * pixels.shape[2] > MOST_PIXELS and hasattr(super(), "encode_tiled_"):
            return super().encode_tiled_(pixels.movedim(-1, 1))  # type: ignore[misc, no-any-return]
        return encoded(self.model, pixels).to(self.output_device, self.vae_output_dtype())

    def encode_tiled(self, pixel_samples: Tensor, *tiles: object, **tiling: object) -> Tensor:
        """Encode without tiles."""
        return self.encode(pixel_samples)

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """IMAGE `[B, H, W, C]` cut in the middle to multiples of 8, as the host does before it encodes."""
        for dim in (1, 2):
            size = pixels.shape[dim] // FACTOR * FACTOR
            pixels = pixels.narrow(dim, (pixels.shape[dim] - size) // 2, size)
        return pixels[..., : self.output_channels]

    # ------------------------------------------------------------ what the host asks

    def process_input(self, image: Tensor) -> Tensor:
        """Pictures from 0..1 to the range of `first_stage_model`, -1..1."""
        return image * 2.0 - 1.0

    def process_output(self, image: Tensor) -> Tensor:
        """The way back, in place."""
        return image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)

    def vae_output_dtype(self) -> torch.dtype:
        """The type of pictures and of samples."""
        return host.intermediate_dtype()

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

    def get_sd(self) -> NoReturn:
        """Raise `VortexError`: the weights are the engine's."""
        from ..vortex_core.errors import VortexError

        raise VortexError(f"The VAE of NF4 Flux Loader cannot be saved or merged. {ADVICE}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Vortex's VAE has no {name}. {ADVICE}", name=name, obj=self)


def decoded(model: Model, samples: Tensor) -> Tensor:
    """LATENT samples to pictures `[B, H, W, 3]` in 0..1, on the engine's device."""
    from ..vortex_core.flux1.request import check_latents

    check_latents(samples, CHANNELS)
    with engines.torchs_own_memory_errors():
        return engines.acquire(model).decode(host.from_native(samples))


def encoded(model: Model, pixels: Tensor) -> Tensor:
    """Pictures `[B, H, W, 3]` in 0..1 to LATENT samples, on the CPU."""
    with engines.torchs_own_memory_errors():
        return host.to_native(engines.acquire(model).encode_image(pixels.clamp(0, 1).float()))


def first_stage_of(model: Model) -> torch.nn.Module:
    """What the host and other packs take for the VAE's network: it encodes and decodes, and has no weights."""
    import torch

    class VortexAutoencoder(torch.nn.Module):
        """Samples as the host's VAE has them, pictures `[B, 3, H, W]` in -1..1."""

        def encode(self, x: Tensor, *args: object, **options: object) -> Tensor:
            return encoded(model, (x.movedim(1, -1) + 1) / 2).to(x.device)

        def decode(self, z: Tensor, *args: object, **options: object) -> Tensor:
            return (decoded(model, z) * 2 - 1).movedim(-1, 1).to(z.device)

    return VortexAutoencoder().eval()
