"""A picture to begin from, and a mask of what is drawn anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VortexInputError, quoted
from ..utils.numeric import whole
from .request import check_floats, check_size
from .sampling import Kept, as_patches, patches
from .spec import MAX_SIZE

LATENT = 8  # pixels for each latent
MOST_PIXELS = MAX_SIZE**2  # of a picture that is encoded


@dataclass(frozen=True, slots=True)
class Start:
    """`image` `[1 or B, H, W, 3]` in 0..1, and `mask` `[1 or B, H, W]`: 1 where it is drawn anew, 0 where it stays."""

    image: Tensor
    mask: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[1], self.image.shape[2]

    @property
    def more(self) -> int:
        """Tensors of the size of latents that inpainting keeps: clean latents, noise, mask."""
        return 0 if self.mask is None else 3

    @property
    def nbytes(self) -> int:
        """Bytes of both on a device, fp32, and of the image's latents, a twelfth of the image."""
        mask = 0 if self.mask is None else self.mask.numel()
        return 4 * (self.image.numel() + mask) + self.image.numel() // 3

    def enter(self, img: Tensor, image: Tensor, more: list[Tensor], sigma: float) -> Kept | None:
        """Put the noise of `img` over the clean latents `image`, at the level `sigma`; what inpainting keeps.

        `img` and each of `more`: packed, `[B, S, 64]`; `image` `[1 or B, 16, H/8, W/8]`.
        """
        height, width = 8 * image.shape[2], 8 * image.shape[3]
        in_patches = as_patches(img, height, width)
        if self.mask is None:
            in_patches.copy_(patches(image).lerp(in_patches, sigma))
            return None
        clean, noise, mask = more
        as_patches(clean, height, width).copy_(patches(image).expand_as(in_patches))
        noise.copy_(img)
        # where any of 8 x 8 pixels is drawn anew, so are their latents
        latent = F.max_pool2d(self.mask[:, None].to(img.device, img.dtype), 8)
        as_patches(mask, height, width).copy_(patches(latent).expand_as(in_patches))
        img.copy_(clean.lerp(noise, sigma))
        return Kept(clean, noise, mask)

    def compose(self, pictures: Tensor) -> Tensor:
        """`pictures` `[B, H, W, 3]` with the image, bit for bit, where the mask is 0; in place."""
        if self.mask is None:
            return pictures
        image, mask = (given.to(pictures.device, pictures.dtype) for given in (self.image, self.mask))
        return torch.lerp(image, pictures, mask[..., None], out=pictures)


def check_start(
    image: object, mask: object, strength: object, height: object, width: object, batch: object
) -> Start | None:
    """A caller's picture to begin from, None if there is none. Raises `VortexInputError` for what does not fit."""
    if image is None:
        for name, given in (("strength", strength), ("mask", mask)):
            if given is not None:
                raise VortexInputError(f"{name} needs an image to begin from.")
        return None
    found = check_pictures("image", image)
    for side, wanted, own in (("height", height, found.shape[1]), ("width", width, found.shape[2])):
        if wanted is not None and whole(wanted) != own:
            raise VortexInputError(f"{side} is {quoted(wanted)}, but the image's is {own}. Resize the image.")
    _check_count("image", found, batch)
    if mask is None:
        return Start(found)
    known = mask[None] if isinstance(mask, Tensor) and mask.ndim == 2 else mask
    masked = _in_range("mask", check_floats("mask", known, ("B", *found.shape[1:3]), "1 where it is drawn anew"))
    _check_count("mask", masked, batch)
    return Start(found, masked)


def check_pictures(name: str, pictures: object) -> Tensor:
    """A caller's pictures `[B, H, W, 3]` in 0..1. Raises `VortexInputError` for what is none."""
    found = check_floats(name, pictures, ("B", "H", "W", 3), "in 0..1")
    check_size(*found.shape[1:3])
    return _in_range(name, found)


def check_encodable(pictures: object) -> Tensor:
    """A caller's pictures for the VAE's encoder alone, which takes more sizes. Raises `VortexInputError`."""
    found = check_floats("pictures", pictures, ("B", "H", "W", 3), "in 0..1")
    height, width = found.shape[1:3]
    if height % LATENT or width % LATENT or height * width > MOST_PIXELS:
        raise VortexInputError(
            f"Height and width of pictures must be multiples of {LATENT}, with {MOST_PIXELS:,} pixels at most; found "
            f"{height} x {width}. Crop or shrink them, or encode them in parts."
        )
    return _in_range("pictures", found)


def _check_count(name: str, values: Tensor, batch: object) -> None:
    if len(values) not in (1, whole(batch)):
        raise VortexInputError(f"{name} holds {len(values)} pictures for {quoted(batch)}: give one, or one each.")


def _in_range(name: str, values: Tensor) -> Tensor:
    low, high = (float(end) for end in values.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also for NaN
        raise VortexInputError(f"{name} must have values from 0 to 1; found {low:g} to {high:g}.")
    return values.detach().clamp(0, 1)
