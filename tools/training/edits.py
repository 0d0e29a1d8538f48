"""Scores drawing from pictures: another colour in the same place, another thing inside a mask, and the VAE by itself.

`recoloured` has scenes whose caption says another colour than the picture shows; `redrawn` scenes whose caption says
another thing, with a mask around the old one. The judge names what came out of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import judge
import scenes
import torch
import typer
from evaluate import MODEL
from scenes import Scene, Thing
from torch import Tensor

from vortex_core import Engine

SIDE = 128
NEAR = 0.03  # of the side: how far a thing may move, and be where it was
HALF = 0.26  # of the side: half of a mask's, so that the largest thing fits in


@dataclass(frozen=True, slots=True)
class Edit:
    """A scene that a picture shows, the one that is asked for, its caption, and where a mask is (`[H, W]`)."""

    shown: Scene
    wanted: Scene
    caption: str
    mask: Tensor

    @property
    def picture(self) -> Tensor:
        """`[H, W, 3]` in 0..1."""
        return scenes.render([self.shown], side=SIDE)[0]

    def keeps_place(self, picture: Tensor) -> bool:
        """Whether a picture has things where this one's are, of their sizes."""
        found = [(thing.x, thing.y, thing.size) for thing in judge.judge(picture).things]
        return len(found) == len(self.shown.things) and all(
            any(abs(x - t.x) < NEAR and abs(y - t.y) < NEAR and size == t.size for x, y, size in found)
            for t in self.shown.things
        )


def recoloured(count: int, seed: int = 77) -> Iterator[Edit]:
    """Scenes of one thing; the caption says another colour."""
    return _edits(count, 1, seed, shape=False)


def redrawn(count: int, things: int, seed: int = 78) -> Iterator[Edit]:
    """Scenes of one or two things; the caption says another shape and colour for the last one."""
    return _edits(count, things, seed, shape=True)


def _edits(count: int, things: int, seed: int, *, shape: bool) -> Iterator[Edit]:
    rng = random.Random(seed)
    while count:
        shown = scenes.sample(rng, things)
        old = shown.things[-1]
        new = replace(old, colour=rng.choice(list(scenes.COLOURS)))
        if shape:
            new = replace(new, shape=rng.choice(scenes.SHAPES))
        same = new.colour == old.colour or (shape and new.shape == old.shape)
        if not same and scenes.contrast(new.colour, shown.background) > scenes.MIN_CONTRAST:
            wanted = replace(shown, things=(*shown.things[:-1], new))
            yield Edit(shown, wanted, scenes.caption(wanted, rng), box(old))
            count -= 1


def box(thing: Thing) -> Tensor:
    """A mask `[H, W]` around a thing: 1 where it is drawn anew."""
    mask = torch.zeros(SIDE, SIDE)
    rows, columns = (
        slice(*(round(SIDE * min(max(middle + side, 0), 1)) for side in (-HALF, HALF))) for middle in (thing.y, thing.x)
    )
    mask[rows, columns] = 1
    return mask


def drawn(engine: Engine, edits: list[Edit], *, masked: bool, at_once: int = 10) -> Tensor:
    """Each edit's picture, `[B, H, W, 3]`, with the engine's default strength."""
    found = []
    for first in range(0, len(edits), at_once):
        some = edits[first : first + at_once]
        mask = torch.stack([edit.mask for edit in some]) if masked else None
        pictures = torch.stack([edit.picture for edit in some])
        found.append(engine.generate([edit.caption for edit in some], seed=first, image=pictures, mask=mask).cpu())
    return torch.cat(found)


def right(edits: list[Edit], pictures: Tensor, *, in_place: bool = False) -> float:
    """The share of pictures that show what was wanted; `in_place`: also where the thing was."""
    pairs = list(zip(edits, pictures, strict=True))
    good = [judge.matches(seen, edit.wanted).ok and (not in_place or edit.keeps_place(seen)) for edit, seen in pairs]
    return sum(good) / len(good)


def reconstructed(engine: Engine, count: int, seed: int = 79) -> tuple[float, float, float]:
    """Encoded and decoded scenes: the share that is judged right, the mean and the lowest PSNR in dB."""
    rng = random.Random(seed)
    shown = [scenes.sample(rng, 1 + i % 2) for i in range(count)]
    pictures = torch.cat([scenes.render([scene], side=SIDE) for scene in shown])
    seen = engine.decode(engine.encode_image(pictures)).cpu()
    psnr = -10 * (seen - pictures).square().mean((1, 2, 3)).log10()
    good = sum(judge.matches(picture, scene).ok for picture, scene in zip(seen, shown, strict=True))
    return good / count, float(psnr.mean()), float(psnr.min())


def main(
    model: Annotated[Path, typer.Argument(help="Model directory in diffusers' layout.")] = MODEL,
    count: Annotated[int, typer.Option(help="Pictures of each kind.")] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    other: Annotated[int, typer.Option(help="Other cases than those of the tests: added to their seeds.")] = 0,
) -> None:
    """Score a model on drawing from pictures; prints one JSON line."""
    with Engine.load(model, device=device) as engine:
        share, mean, lowest = reconstructed(engine, count, 79 + other)
        result = {"count": count, "reconstructed": share, "psnr": round(mean, 1), "lowest psnr": round(lowest, 1)}
        edits = list(recoloured(count, 77 + other))
        result["another colour, in place"] = right(edits, drawn(engine, edits, masked=False), in_place=True)
        for things in (1, 2):
            edits = list(redrawn(count, things, 78 + other))
            result[f"another thing in a mask, of {things}"] = right(edits, drawn(engine, edits, masked=True))
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
