"""Vortex NAG: a MODEL that keeps away from a negative prompt, in one pass of each step."""

from __future__ import annotations

from typing import Any

from .types import verdict

OPTION = "vortex_nag"  # of the host's transformer_options: a `native_nag.Wish`


class VortexNag:
    """Sets the options that the MODEL's own steps read (native_steps.py)."""

    CATEGORY = "Vortex"
    DESCRIPTION = (
        "Normalized attention guidance: the picture keeps away from the negative prompt, also at CFG 1 and 4 steps. "
        "It costs a part of a step, where CFG takes twice as long."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for KSampler with cfg 1. Its own negative input then has no effect.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..vortex_core.flux1.nag import RANGES, Nag

        usual = Nag()

        def number(name: str, step: float, tooltip: str) -> tuple[str, dict[str, Any]]:
            low, high = RANGES[name]
            return "FLOAT", {
                "default": getattr(usual, name), "min": low, "max": high, "step": step, "tooltip": tooltip,
            }  # fmt: skip

        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The third output of NF4 Flux Loader, or a node after it."}),
                "negative": ("CONDITIONING", {"tooltip": "What to keep away from: CLIP Text Encode."}),
                "scale": number("scale", 0.5, "How far the picture is led away. 1 is without effect."),
                "tau": number("tau", 0.1, "How much stronger attention may become at most. Lower is more careful."),
                "alpha": number("alpha", 0.05, "How much of the result is blended in. 0 is without effect."),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, scale: float | None = None, tau: float | None = None, alpha: float | None = None
    ) -> str | bool:
        """Whether these numbers can be used. A linked input is None."""
        from ..vortex_core.flux1.nag import Nag

        given = {"scale": scale, "tau": tau, "alpha": alpha}
        return verdict(lambda: Nag(**{name: value for name, value in given.items() if value is not None}))

    def apply(self, model: Any, negative: Any, scale: float, tau: float, alpha: float) -> tuple[Any]:
        from ..vortex_core.errors import VortexInputError
        from ..vortex_core.flux1.nag import Nag
        from .native_nag import Wish
        from .sampler import from_native

        nag = Nag(scale, tau, alpha)
        if not hasattr(getattr(model, "model", None), "vortex"):
            raise VortexInputError(
                "Vortex NAG needs the MODEL of NF4 Flux Loader. For another model use ComfyUI's Normalized Attention "
                "Guidance."
            )
        txt, pooled = from_native(negative)[0]
        made = model.clone()
        options = dict(made.model_options.get("transformer_options", {}))
        made.model_options["transformer_options"] = {**options, OPTION: Wish(nag, txt, pooled)}
        return (made,)
