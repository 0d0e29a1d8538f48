"""Vortex LoRA: a model, drawn with a LoRA more."""

from __future__ import annotations

import time
from typing import Any

from . import loras
from .types import MODEL, STRONGEST, Model, verdict


class VortexLora:
    """Adds a LoRA to the handle of a model. Nothing is loaded again: the sampler draws with it."""

    CATEGORY = "Vortex"
    DESCRIPTION = "Draws with a LoRA. Put several in a row: they add up. The model is not loaded again."
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with this LoRA, for the next Vortex LoRA, Schnell Sampler and Latency Probe.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL, {"tooltip": "From NF4 Flux Loader, or from another Vortex LoRA."}),
                "lora_name": (
                    loras.available(),
                    {
                        "tooltip": "A file in models/loras, made for FLUX.1. tiny-outlines is bundled: it makes the "
                        "miniature tiny-schnell draw outlines, and teaches it the colour lime."
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -STRONGEST,
                        "max": STRONGEST,
                        "step": 0.05,
                        "tooltip": "How strongly it counts. 1 is as it was trained, 0 is without it, below 0 turns it "
                        "round.",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None, strength: float | None = None) -> str | bool:
        """Whether this file is a LoRA that can be used, or why not, before a workflow runs. A linked input is None."""
        given = 1.0 if strength is None else strength
        return verdict(lambda: lora_name is None or loras.check_before(loras.find(lora_name, given)))

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, strength: float | None = None, model: None = None) -> str:
        if lora_name is None:  # linked, so the file is not known yet
            return str(time.time_ns())
        return loras.find(lora_name).fingerprint

    def apply(self, model: Model, lora_name: str, strength: float) -> tuple[Model]:
        lora = loras.find(lora_name, strength)
        loras.check(lora, model.spec)
        return (model.with_lora(lora),)
