"""PNG files that remember how they were made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .finite import check_finite


def save_png(picture: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a float `[H, W, 3]` picture in 0..1, with `metadata` as PNG text, whole or not at all.

    Raises `NotFiniteError` for NaN, before anything is written, and `OSError` where the folder cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    check_finite(picture, f"The picture for {path.name}")
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    levels = picture.mul(255).round().byte().cpu()
    image = Image.frombytes("RGB", (levels.shape[1], levels.shape[0]), bytes(levels.contiguous().untyped_storage()))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
