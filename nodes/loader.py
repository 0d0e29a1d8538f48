"""NF4 Flux Loader: from a model's name to a handle that the other nodes take."""

from __future__ import annotations

from typing import Any

from ..vortex_core.flux1.spec import MODES
from . import engines
from .models import OWN, available, choices, find
from .types import MODEL, Model, verdict
from .vae import Decoder, vae_of


class NF4FluxLoader:
    """Loads FLUX.1-schnell once and keeps it: queueing again never loads again."""

    CATEGORY = "Vortex"
    DESCRIPTION = "Loads FLUX.1-schnell in 4-bit NF4, once; queueing again does not load again."
    RETURN_TYPES = (MODEL, "VAE", "MODEL", "CLIP")  # new outputs come last: saved workflows link them by position
    RETURN_NAMES = ("model", "vae", "native_model", "clip")
    OUTPUT_TOOLTIPS = (
        "For Vortex LoRA, the Schnell Sampler and the Latency Probe.",
        "The model's own VAE for the host's nodes: VAE Decode, VAE Encode and others that take a VAE.",
        "The same model for ComfyUI's own nodes: KSampler, Load LoRA, Apply ControlNet and others that take a MODEL. "
        "It is not loaded twice.",
        "The model's own text encoders for the host's nodes: CLIP Text Encode, Load LoRA and others that take a CLIP. "
        "T5 reads long prompts whole, and weights such as (word:1.2) count.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    available(),
                    {
                        "tooltip": "tiny-schnell is bundled: a trained miniature that draws simple coloured shapes "
                        "anywhere. Others are FLUX.1-schnell: files in models/diffusion_models, unet or checkpoints, "
                        "or whole folders in models/vortex or models/diffusers."
                    },
                ),
                "vram_budget": (
                    "FLOAT",
                    {
                        "default": 6.5,
                        "min": 0.5,
                        "max": 200.0,
                        "step": 0.5,
                        "tooltip": "GB of VRAM that this model may take at its peak. Other models leave the card until "
                        "that much is free. Weights that do not fit stream from host memory, which is slower. A "
                        "budget that cannot do is refused. Without a GPU it has no effect.",
                    },
                ),
                "mode": (
                    list(MODES),
                    {
                        "tooltip": "fast: the fastest products in 8 bits of this card: int8 on RTX 30 and 40, fp8 on "
                        "H100 and H200, the faster of both on later cards; exact where neither runs. exact: products "
                        "in 16 bits, as diffusers with bitsandbytes has them. int8 and fp8 ask for one by name. "
                        "Pictures differ slightly; another mode loads the model again."
                    },
                ),
            },
            # new inputs come last: saved workflows list values by position
            "optional": {
                "clip_l": (
                    choices("clip"),
                    {"tooltip": "CLIP, for a model without it: clip_l in models/text_encoders or models/clip."},
                ),
                "t5xxl": (
                    choices("t5"),
                    {"tooltip": "T5, for a model without it: t5xxl in models/text_encoders or models/clip."},
                ),
                "vae": (
                    choices("vae"),
                    {"tooltip": "The VAE, for a model without it: ae.safetensors in models/vae."},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, model: str | None = None, clip_l: str | None = OWN, t5xxl: str | None = OWN, vae: str | None = OWN
    ) -> str | bool:
        """Whether these files can be used, or why not, before a workflow runs. A linked input is None."""
        return verdict(
            lambda: model is None or find(model, 1.0, MODES[0], clip=clip_l or OWN, t5=t5xxl or OWN, vae=vae or OWN)
        )

    @classmethod
    def IS_CHANGED(
        cls, model: str, vram_budget: float, mode: str, clip_l: str = OWN, t5xxl: str = OWN, vae: str = OWN
    ) -> str:
        return find(model, vram_budget, mode, clip=clip_l, t5=t5xxl, vae=vae).fingerprint

    def load(
        self, model: str, vram_budget: float, mode: str, clip_l: str = OWN, t5xxl: str = OWN, vae: str = OWN
    ) -> tuple[Model, Decoder, Any, Any]:
        handle = find(model, vram_budget, mode, clip=clip_l, t5=t5xxl, vae=vae)
        return handle, vae_of(handle), engines.native(handle), engines.native_clip(handle)
