"""Schnell Sampler: from a prompt or native CONDITIONING, and perhaps a picture, to pictures and their latents."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..vortex_core.flux1.request import DEFAULT_STRENGTH, MOST_GUIDANCE
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
STRENGTH = (
    "FLOAT",
    {
        "default": DEFAULT_STRENGTH,
        "min": 0.05,
        "max": 1.0,
        "step": 0.05,
        "tooltip": "How much of the image is drawn anew, and which share of the steps is taken. Without an image it "
        "has no effect.",
    },
)
NAG = (
    "FLOAT",
    {
        "default": 0.0,
        "min": 0.0,
        "max": 50.0,
        "step": 0.5,
        "tooltip": "Normalized attention guidance: how far to keep away from negative_prompt. 5 is usual, 0 is off. It "
        "costs a part of a step.",
    },
)
GUIDANCE = (
    "FLOAT",
    {
        "default": 0.0,
        "min": 0.0,
        "max": MOST_GUIDANCE,
        "step": 0.1,
        "tooltip": "Classifier-free guidance (CFG) away from negative_prompt: each step runs twice. 0 and 1 are off, "
        "as schnell is made.",
    },
)
MAX_BATCH = 64
USED = {"pooled_output", "guidance"}  # guidance has no effect, without a warning: Flux graphs often set it


class SchnellSampler:
    """Draws in 4 steps without guidance, as schnell is made, unless it is asked for."""

    CATEGORY = "Vortex"
    DESCRIPTION = (
        "Draws pictures with FLUX.1-schnell in 4 steps, from nothing or from a picture. It needs no guidance by design."
    )
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
                        "tooltip": "What to keep away from. It needs nag or guidance, and the log says so where it has "
                        "none: by itself schnell has no second pass for it.",
                    },
                ),
                "conditioning": (
                    "CONDITIONING",
                    {"tooltip": "From CLIP Text Encode with a Flux CLIP (T5-XXL and CLIP-L), in place of the prompt."},
                ),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "A picture to begin from. Its size counts, cut in the middle to multiples of 16, in "
                        "place of width and height."
                    },
                ),
                "mask": (
                    "MASK",
                    {
                        "tooltip": "Where the image is drawn anew. The rest of it stays as it is, to the bit. Take "
                        "strength 1 with it, for a thing that was not there."
                    },
                ),
                "strength": STRENGTH,
                "nag": NAG,
                "guidance": GUIDANCE,
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
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float = DEFAULT_STRENGTH,
        nag: float = 0.0,
        guidance: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        from ..vortex_core.device.finite_pictures import check_finite
        from ..vortex_core.flux1.request import check_prompt

        given = given_pictures(image, mask, batch_size, strength)
        if image is not None:
            (height, width), batch_size = given["image"].shape[1:3], given["batch_size"]
        check(width, height, batch_size, seed, steps, strength=strength, nag=nag, guidance=guidance)
        if conditioning is None:
            check_prompt(prompt)
            engine, texts = engines.acquire(model), [prompt]
        else:
            pairs = from_native(conditioning)
            engine = engines.acquire(model)
            with engines.torchs_own_memory_errors():  # LoRAs may take room
                texts = [engine.condition(txt, pooled, steps, model.pairs) for txt, pooled in pairs]
        if len(texts) > 1:
            texts = [texts[i % len(texts)] for i in range(batch_size)]
        report, preview = host.progress(steps), host.previewer(engine.device)
        latents: list[Tensor] = []

        def on_step(i: int, n: int, clean: Tensor) -> None:
            if clean.is_cuda:
                # work is queued ahead of the card: the bar would jump, and an interrupt would come too late
                torch.cuda.synchronize(clean.device)
            report(steps - n + i, preview(clean) if preview else None)
            if i == n:
                latents.append(host.to_native(clean))

        with engines.torchs_own_memory_errors():
            pictures = engine.generate(
                texts, negative_prompt, seed=seed, height=height, width=width, steps=steps, on_step=on_step,
                loras=model.pairs, nag=nag, guidance=guidance, **{"batch_size": batch_size, **given},
            ).cpu()  # fmt: skip
        check_finite(pictures, "The picture")
        return pictures, {"samples": latents[-1]}


def check(
    width: int = MIN_SIZE,
    height: int = MIN_SIZE,
    batch_size: int = 1,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    *,
    strength: float = 1.0,
    nag: float = 0.0,
    guidance: float = 0.0,
) -> None:
    """Raise `VortexInputError` for a size, batch, seed, number of steps or guidance that no model draws with."""
    from ..vortex_core.errors import VortexInputError, quoted
    from ..vortex_core.flux1.nag import check_nag
    from ..vortex_core.flux1.request import Request

    Request(seed, height, width, steps, batch_size, strength=strength, guidance=guidance, nag=check_nag(nag))
    if batch_size > MAX_BATCH:
        raise VortexInputError(f"batch_size must be at most {MAX_BATCH}, not {quoted(batch_size)}. Queue more often.")


def given_pictures(image: Tensor | None, mask: Tensor | None, batch_size: int, strength: float) -> dict[str, Any]:
    """What `Engine.generate` is given for a picture to begin from: nothing where there is none.

    `image` `[B, H, W, 3 or 4]`, and `mask` `[B, h, w]` or `[h, w]`, which is stretched over it, as the host does. Both
    are cut in the middle to multiples of 16.
    """
    from ..vortex_core.errors import VortexInputError

    if image is None:
        if mask is not None:
            raise VortexInputError("mask needs an image. Connect both.")
        return {}
    if image.ndim != 4:
        raise VortexInputError(f"image must be [B, H, W, 3], as Load Image gives it, not {list(image.shape)}.")
    size = image.shape[1:3]
    found: dict[str, Any] = {"image": _cut(image[..., :3]), "strength": strength, "batch_size": batch_size}
    if batch_size == 1:
        found["batch_size"] = len(image)
    if mask is not None:
        import torch.nn.functional as F

        masks = mask.reshape(-1, 1, *mask.shape[-2:]).float()
        if masks.shape[2:] != size:
            masks = F.interpolate(masks, size, mode="bilinear", antialias=False)
        found["mask"] = _cut(masks[:, 0]).clamp(0, 1)
    return found


def _cut(picture: Tensor) -> Tensor:
    """`[B, H, W, ...]`, cut in the middle to multiples of 16."""
    for dim in (1, 2):
        size = picture.shape[dim] // SIZE_MULTIPLE * SIZE_MULTIPLE
        picture = picture.narrow(dim, (picture.shape[dim] - size) // 2, size)
    return picture


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
