"""PNG files that say how they were made, in the form that other programs read."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import __version__
from ..utils.printable import printable

if TYPE_CHECKING:
    from torch import Tensor


def encode(picture: Tensor, texts: Mapping[str, str]) -> bytes:
    """A float `[H, W, 3]` picture in 0..1 as a PNG file with `texts` and Vortex's version.

    ComfyUI's names (`prompt`, `workflow`) hold its own JSON. AUTOMATIC1111's `parameters` is read by most programs.
    Raises `NotFiniteError` for NaN.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ..device.finite_pictures import check_finite

    check_finite(picture, "The picture")
    info = PngInfo()
    for key, text in {**texts, "Software": f"vortex {__version__}"}.items():
        # iTXt takes every character, but some readers know only tEXt
        (info.add_text if text.isascii() else info.add_itxt)(key, text)
    levels = picture.mul(255).round().byte().cpu()
    image = Image.frombytes("RGB", (levels.shape[1], levels.shape[0]), bytes(levels.contiguous().untyped_storage()))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def parameters(
    prompt: str,
    *,
    steps: int,
    seed: int,
    width: int,
    height: int,
    model: str,
    negative: str = "",
    guidance: float = 0.0,
    others: Mapping[str, float] | None = None,
) -> str:
    """How a picture was made, as AUTOMATIC1111 writes it: the prompt, then one line of `Name: value, ...`.

    `negative`: the prompt that it keeps away from, if that had an effect.
    """
    model = printable(model)  # a file's name may have bytes that are no text
    facts = {
        "Steps": steps,
        "Sampler": "Euler",
        "CFG scale": f"{max(guidance, 1):g}",  # 1: no guidance
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": json.dumps(model, ensure_ascii=False) if set(model) & set(',:"\n') else model,
        **{name: f"{value:g}" for name, value in (others or {}).items()},
        "Version": f"vortex {__version__}",
    }
    away = f"Negative prompt: {negative}\n" if negative else ""
    return f"{prompt}\n{away}" + ", ".join(f"{name}: {value}" for name, value in facts.items())
