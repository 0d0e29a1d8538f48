"""NF4 Flux Loader: from a model's name to a handle that the other nodes take."""

from __future__ import annotations

from typing import Any

from . import engines
from .types import MODEL, Model
from .vae import Decoder


class NF4FluxLoader:
    """Loads FLUX.1-schnell once and keeps it: queueing again never loads again."""

    CATEGORY = "Vortex"
    DESCRIPTION = "Loads FLUX.1-schnell in 4-bit NF4, once; queueing again does not load again."
    RETURN_TYPES = (MODEL, "VAE")
    RETURN_NAMES = ("model", "vae")
    OUTPUT_TOOLTIPS = (
        "For the Schnell Sampler and the Latency Probe.",
        "The model's own VAE for the host's VAE Decode. It only decodes; to encode pictures use Load VAE.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    engines.available(),
                    {
                        "tooltip": "tiny-schnell is bundled: a trained miniature that draws simple coloured shapes "
                        "anywhere. Others are FLUX.1-schnell folders in the diffusers layout in models/vortex or "
                        "models/diffusers."
                    },
                ),
                "vram_budget": (
                    "FLOAT",
                    {
                        "default": 6.5,
                        "min": 0.5,
                        "max": 200.0,
                        "step": 0.5,
                        "tooltip": "GB of VRAM to keep for this model: other models leave the card until so much is "
                        "free, and a model whose weights alone need more is refused. It makes room and does not cap "
                        "what a large picture takes. Without a GPU it means nothing.",
                    },
                ),
                "mode": (
                    ["exact"],
                    {"tooltip": "exact: NF4 weights, 16-bit products; the only mode there is so far."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: str, vram_budget: float, mode: str) -> str:
        return engines.find(model, vram_budget, mode).fingerprint

    def load(self, model: str, vram_budget: float, mode: str) -> tuple[Model, Decoder]:
        handle = engines.find(model, vram_budget, mode)
        engines.acquire(handle)
        return handle, Decoder(handle)
