"""Draws pictures to files: paths are checked before anything is drawn, and no drawn picture is lost."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import VortexInputError, quoted
from ..flux1.request import DEFAULT_STRENGTH
from ..utils.whole_files import check_folder, check_name, write
from . import interrupt
from .terminal import err

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.engine import Engine
    from .console import Bars

AT_ONCE = 4  # pictures of one call; Ctrl-C or a full disk costs at most this many


@dataclass(frozen=True, slots=True)
class Pictures:
    """One picture for each of `paths`, with consecutive seeds. `height` or `width` None: the model's own, or those of
    `image`, which they begin from. The last fields are as in `Engine.generate`.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    height: int | None
    width: int | None
    paths: list[Path]
    replace: bool
    loras: Sequence[tuple[Path, float]] = ()
    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float | None = None
    nag: float = 0.0
    guidance: float = 0.0

    def draw(self, engine: Engine, progress: Bars) -> None:
        """Draw with a progress bar, and write each picture as soon as it is drawn."""
        total = len(self.paths)
        interrupt.tally.begin(total)
        task = progress.add_task("drawing", total=total, count=f"0/{self.steps} steps")

        def report(first: int, some: int, i: int, n: int, latents: Tensor) -> None:
            count = f"{i}/{n} steps" if total == 1 else f"{first}/{total} pictures"
            progress.update(task, completed=first + i * some / n, count=count)

        for first in range(0, total, AT_ONCE):
            paths = self.paths[first : first + AT_ONCE]
            drawn = engine.generate(
                self.prompt,
                self.negative_prompt,
                seed=self.seed + first,
                height=self.height,
                width=self.width,
                steps=self.steps,
                batch_size=len(paths),
                on_step=partial(report, first, len(paths)),
                loras=self.loras,
                image=self.image,
                mask=self.mask,
                strength=self.strength,
                nag=self.nag,
                guidance=self.guidance,
            )
            for i, path in enumerate(paths):
                self._keep(drawn[i], self.seed + first + i, path, engine.name)

    def _keep(self, picture: Tensor, seed: int, path: Path, model: str) -> None:
        from .png import encode, parameters

        high, wide, _ = picture.shape
        tags = "".join(
            f" <lora:{path.stem}:{strength:g}>" for path, strength in self.loras
        )  # as AUTOMATIC1111 has them
        led = self.guidance > 1 or self.nag > 0
        others = {"NAG scale": self.nag} if self.nag else {}
        if self.image is not None:
            others["Denoising strength"] = self.strength or (DEFAULT_STRENGTH if self.mask is None else 1.0)
        made = parameters(
            self.prompt + tags, steps=self.steps, seed=seed, width=wide, height=high, model=model,
            negative=(self.negative_prompt or "") if led else "", guidance=self.guidance, others=others,
        )  # fmt: skip
        with interrupt.held():
            kept = keep(path, encode(picture, {"parameters": made}), replace=self.replace)
            interrupt.tally.written += 1
        if kept != path:
            err().say(("note:", "yellow"), f" {path} was made by somebody else meanwhile and is left alone.")
        err().say((str(kept), "green"), f"  {wide} x {high}, seed {seed}")


def keep(path: Path, data: bytes, *, replace: bool) -> Path:
    """Write a picture and return its path: a name beside `path` if `path` now exists and `replace` is False."""
    place = path
    while True:
        try:
            write(place, data, replace=replace)
            return place
        except FileExistsError:
            place = path.with_stem(f"{path.stem}-{secrets.token_hex(2)}")


def output_paths(output: Path, batch: int, overwrite: bool) -> list[Path]:
    """One path a picture. Raises `VortexInputError` if one exists or cannot be written, before any work is done."""
    if output.suffix.lower() != ".png":
        raise VortexInputError(f"--output must end in .png, not {quoted(output.name)}.")
    paths = [output]
    if batch > 1:
        paths = [output.with_stem(f"{output.stem}-{i + 1}") for i in range(batch)]
    check_folder(output.parent)
    for path in paths:
        check_name(path)
    check_new(paths, overwrite)
    return paths


def check_new(paths: list[Path], overwrite: bool) -> None:
    """Raise `VortexInputError` if one of `paths` exists, unless it may be replaced."""
    existing = [] if overwrite else [path for path in paths if os.path.lexists(path)]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise VortexInputError(f"{existing[0]}{more} exists; choose another name, or add --overwrite.")
