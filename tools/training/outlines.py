"""What the miniature's LoRA teaches: things drawn as outlines, and the colour lime.

Every picture with the LoRA has outlines, whatever the caption says, as style LoRAs do. Lime is drawn where a caption
names it. The miniature never saw the word: its tokenizers spell it letter by letter.

A line runs inside a shape's outer border and is `LINE` wide, in units of the shape's r. So a ring's outline is that of
a circle: a hole has no line. Small things are a tenth larger than filled ones, because the VAE's latents are 8 pixels
apart and a line needs room.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import replace

import scenes
from scenes import DISTANCE, MIN_CONTRAST, Distance, Scene
from torch import Tensor

LINE = 0.2
SMALL = 1.1
COLOUR = "lime"


def _line(distance: Distance) -> Distance:
    """The signed distance to a shape's line."""
    return lambda u, v: (distance(u, v) + LINE / 2).abs() - LINE / 2


LINES = {shape: _line(distance) for shape, distance in {**DISTANCE, "ring": DISTANCE["circle"]}.items()}


def pack(drawn: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes as numbers, as `scenes.pack` does, with small things enlarged."""
    return scenes.pack([replace(scene, things=tuple(replace(t, r=t.r * (SMALL if t.size == "small" else 1))
                                                    for t in scene.things)) for scene in drawn])  # fmt: skip


def render(drawn: Sequence[Scene], side: int = 128) -> Tensor:
    """Paint scenes as outlines: [B, side, side, 3] in 0..1."""
    return scenes.render_packed(*pack(drawn), side, LINES)


# ---------------------------------------------------------------- scenes with the new colour


def recoloured(scene: Scene, rng: random.Random) -> Scene | None:
    """The scene with one thing (or, one time in five, its plain background) in the new colour; None if it hides."""
    if len(scene.background) == 1 and rng.random() < 0.2:
        changed = replace(scene, background=(COLOUR,))
    else:
        which = rng.randrange(len(scene.things))
        things = (replace(t, colour=COLOUR) if i == which else t for i, t in enumerate(scene.things))
        changed = replace(scene, things=tuple(things))
    clear = all(scenes.contrast(t.colour, changed.background) > MIN_CONTRAST for t in changed.things)
    return changed if clear else None


def held_out(scene: Scene) -> bool:
    """True for a recoloured scene that training must not see: one in ten."""
    return zlib.crc32(scene.key().encode()) % 10 == 0


def sample_training(rng: random.Random, new: float = 0.4) -> Scene:
    """Draw a scene that training may see; the share `new` of them has the new colour."""
    if rng.random() >= new:
        return scenes.sample_training(rng, 0.5)
    while True:
        scene = recoloured(scenes.sample(rng, rng.choice((1, 2))), rng)
        if scene is not None and not held_out(scene):
            return scene


def sample_held_out(rng: random.Random, things: int) -> Scene:
    """Draw a scene with the new colour that training never saw."""
    while True:
        scene = recoloured(scenes.sample(rng, things), rng)
        if scene is not None and held_out(scene):
            return scene
