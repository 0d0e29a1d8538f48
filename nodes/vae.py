"""The model's VAE decoder in the shape that the host's decode nodes call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import engines, host
from .types import Model

if TYPE_CHECKING:
    from torch import Tensor


class Decoder:
    """Decodes with the engine of `model`, which already holds these weights; a second copy would cost VRAM."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def decode(self, samples: Tensor, vae_options: object = None) -> Tensor:
        """LATENT samples `[B, 16, H/8, W/8]` to IMAGE `[B, H, W, 3]`."""
        with engines.torchs_own_memory_errors():
            return engines.acquire(self.model).decode(host.from_native(samples)).cpu()

    def decode_tiled(self, samples: Tensor, **tiling: object) -> Tensor:
        """Whole all the same: tiles would change the picture."""
        return self.decode(samples)

    def __getattr__(self, name: str) -> Any:
        from ..vortex_core.errors import VortexError

        if name.startswith("encode"):
            raise VortexError(
                "Vortex's VAE only decodes. To encode a picture, use Load VAE with FLUX's ae.safetensors."
            )
        raise AttributeError(f"Vortex's VAE has no {name}; for this node, use Load VAE with FLUX's ae.safetensors.")
