"""Schnell Sampler: from a prompt, or native CONDITIONING, to pictures and their latents."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..vortex_core.flux1.spec import DEFAULT_STEPS, MAX_SIZE, MAX_STEPS, MIN_SIZE, SIZE_MULTIPLE
from . import engines, host
from .types import MODEL, Model, verdict

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

# Inputs, as the Latency Probe has them too.
MODEL_INPUT = (MODEL, {"tooltip": "From NF4 Flux Loader or Vortex LoRA."})
SIDE = (
    "INT",
    {
        "default": 1024,
        "min": MIN_SIZE,
        "max": MAX_SIZE,
        "step": SIZE_MULTIPLE,
        "tooltip": f"Pixels, a multiple of {SIZE_MULTIPLE}. tiny-schnell was trained at 128.",
    },
)
STEPS = (
    "INT",
    {"default": DEFAULT_STEPS, "min": 1, "max": MAX_STEPS, "tooltip": "schnell is distilled for 4; more seldom help."},
)
MAX_BATCH = 64
USED = {"pooled_output", "guidance"}  # guidance has no effect, without a warning: Flux graphs often set it


class SchnellSampler:
    """Draws in 4 steps at guidance 0, as schnell is made."""

    CATEGORY = "Vortex"
    DESCRIPTION = "Draws pictures with FLUX.1-schnell in 4 steps. Guidance is 0 by design."
    RETURN_TYPES = ("IMAGE", "LATENT")
    RETURN_NAMES = ("image", "latent")
    OUTPUT_TOOLTIPS = ("The pictures.", "Their latents, for VAE Decode, latent upscalers and Save Latent.")
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": MODEL_INPUT,
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "tooltip": "What the picture shows. T5 reads up to 256 tokens of it, CLIP 77; the log quotes "
                        "what is cut. Not used where conditioning is connected.",
                    },
                ),
                "width": SIDE,
                "height": SIDE,
                "batch_size": (
                    "INT",
                    {
                        "default": 1,
                        "min": 1,
                        "max": MAX_BATCH,
                        "tooltip": "Pictures. Picture i starts from the noise of seed + i.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**64 - 1,
                        "control_after_generate": True,
                        "tooltip": "The same seed draws the same picture; the noise is that of the host's KSampler.",
                    },
                ),
                "steps": STEPS,
            },
            "optional": {
                "negative_prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "",
                        "tooltip": "Has no effect, and the log says so: at guidance 0 there is no second pass for it.",
                    },
                ),
                "conditioning": (
                    "CONDITIONING",
                    {"tooltip": "From CLIP Text Encode with a Flux CLIP (T5-XXL and CLIP-L), in place of the prompt."},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        width: int | None = None,
        height: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> str | bool:
        """Whether pictures of this kind can be drawn, before a model is loaded. A linked input is None."""
        given = {"width": width, "height": height, "batch_size": batch_size, "seed": seed}
        return verdict(lambda: check(**{name: value for name, value in given.items() if value is not None}))

    def sample(
        self,
        model: Model,
        prompt: str,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        steps: int,
        negative_prompt: str = "",
        conditioning: list[Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        from ..vortex_core.device.finite_pictures import check_finite
        from ..vortex_core.flux1.request import check_prompt

        check(width, height, batch_size, seed, steps)
        if conditioning is None:
            check_prompt(prompt)
            engine = engines.acquire(model)
            calls: list[tuple[Any, int, int]] = [(prompt, seed, batch_size)]
        else:
            pairs = from_native(conditioning)
            engine = engines.acquire(model)
            with engines.torchs_own_memory_errors():  # LoRAs may take room
                several = [engine.condition(txt, pooled, steps, model.pairs) for txt, pooled in pairs]
            calls = [(several[0], seed, batch_size)]
            if len(several) > 1:
                calls = [(several[i % len(several)], seed + i, 1) for i in range(batch_size)]
        report = host.progress(len(calls) * steps)
        preview = host.previewer(engine.device)
        images, latents = [], []

        def on_step(i: int, n: int, clean: Tensor) -> None:
            if clean.is_cuda:
                # work is queued ahead of the card: the bar would jump, and an interrupt would come too late
                torch.cuda.synchronize(clean.device)
            report(len(latents) * n + i, preview(clean) if preview else None)
            if i == n:
                latents.append(host.to_native(clean))

        for what, first, count in calls:
            with engines.torchs_own_memory_errors():
                done = engine.generate(
                    what, negative_prompt, seed=first, height=height, width=width, steps=steps, batch_size=count,
                    on_step=on_step, loras=model.pairs,
                )  # fmt: skip
            images.append(done.cpu())
            check_finite(images[-1], "The picture")
        return torch.cat(images), {"samples": torch.cat(latents)}


def check(
    width: int = MIN_SIZE, height: int = MIN_SIZE, batch_size: int = 1, seed: int = 0, steps: int = DEFAULT_STEPS
) -> None:
    """Raise `VortexInputError` for a size, batch, seed or number of steps that no model draws."""
    from ..vortex_core.errors import VortexInputError, quoted
    from ..vortex_core.flux1.request import Request

    Request(seed=seed, height=height, width=width, steps=steps, batch_size=batch_size)
    if batch_size > MAX_BATCH:
        raise VortexInputError(f"batch_size must be at most {MAX_BATCH}, not {quoted(batch_size)}. Queue more often.")


def from_native(conditioning: Any) -> list[tuple[Tensor, Tensor]]:
    """T5's `[1, N, D]` and CLIP's `[1, V]` for each prompt of `[[T5 [B, N, D], {"pooled_output": [B, V]}]]`.

    Raises `VortexInputError` for several entries (Combine, areas), or for what a Flux CLIP did not make.
    """
    import torch

    from ..vortex_core.errors import VortexInputError, quoted

    if not isinstance(conditioning, list | tuple):
        raise VortexInputError(f"conditioning must come from CLIP Text Encode; this is {quoted(conditioning)}.")
    if len(conditioning) != 1:
        raise VortexInputError(
            f"conditioning holds {len(conditioning)} entries; Vortex takes one, straight from CLIP Text Encode. "
            "Combined prompts and areas need guidance, which schnell does not have."
        )
    txt, extras = conditioning[0]
    pooled = extras.get("pooled_output")
    if pooled is None:
        raise VortexInputError("conditioning has no pooled CLIP vector. Load the CLIP with type flux.")
    if not (isinstance(txt, torch.Tensor) and isinstance(pooled, torch.Tensor) and (txt.ndim, pooled.ndim) == (3, 2)):
        raise VortexInputError("conditioning is not of a Flux CLIP: expected T5's [B, N, D] and CLIP's [B, V].")
    if pooled.shape[0] not in (1, txt.shape[0]):
        raise VortexInputError(f"conditioning has {txt.shape[0]} texts but {pooled.shape[0]} pooled vectors.")
    ignored = sorted(set(extras) - USED)
    if ignored:
        log.warning("conditioning: %s has no effect in Vortex", ", ".join(ignored))
    return list(zip(txt.split(1), pooled.expand(txt.shape[0], -1).split(1), strict=True))
