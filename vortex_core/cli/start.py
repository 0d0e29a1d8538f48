"""Pictures that the command begins from: read, turned as the camera was held, and cut to a size that can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import VortexInputError, quoted
from ..flux1.request import check_size
from ..flux1.spec import MAX_SIZE, SIZE_MULTIPLE

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def read_start(
    image: Path | None, mask: Path | None, strength: float | None, width: int | None, height: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """The image `[1, H, W, 3]` and the mask `[1, H, W]` (white: drawn anew), in 0..1; None where there is none.

    Without a size the image keeps its own, cut in the middle to multiples of 16; with one it is scaled to cover that,
    and cut. Raises `VortexInputError` for files that are no pictures, and for a mask of another size.
    """
    if image is None:
        for option, given in (("--mask", mask), ("--strength", strength)):
            if given is not None:
                raise VortexInputError(f"{option} needs --image, the picture to begin from.")
        return None, None
    picture, found = _read("--image", image).convert("RGB"), None
    if mask is not None:
        found = _read("--mask", mask).convert("L")
        if found.size != picture.size:
            raise VortexInputError(
                f"--mask is {found.size[0]}x{found.size[1]}, but the image {picture.size[0]}x{picture.size[1]}."
            )
    own = tuple(side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in picture.size)
    size = own if width is None or height is None else (width, height)
    if max(size) > MAX_SIZE:
        raise VortexInputError(
            f"--image is {picture.size[0]}x{picture.size[1]}, and at most {MAX_SIZE} pixels a side can be drawn. Name "
            "a --size: the image is scaled to it."
        )
    check_size(size[1], size[0])
    return _tensor(picture, size), None if found is None else _tensor(found, size)


def _read(option: str, path: Path) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except UnidentifiedImageError:
        raise VortexInputError(f"{option} {quoted(str(path))} is not a picture that can be read.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VortexInputError(f"{option} {quoted(str(path))} cannot be read: {error}.") from None


def _tensor(picture: Image, size: tuple[int, ...]) -> Tensor:
    """`[1, H, W]` or `[1, H, W, 3]`, scaled only where the middle of the picture is not just cut out."""
    import torch
    from PIL import Image, ImageOps

    wide, high = size
    if (wide, high) == tuple(side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in picture.size):
        left, top = (picture.width - wide) // 2, (picture.height - high) // 2
        picture = picture.crop((left, top, left + wide, top + high))
    else:
        picture = ImageOps.fit(picture, (wide, high), Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, high, wide, -1)
    return (values if values.shape[3] == 3 else values[..., 0]).float() / 255
