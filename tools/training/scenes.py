"""Generated scenes: what they hold, how captions describe them, how they look.

A `Scene` is one or two coloured shapes on a plain or graded background. `sample` draws one from a seeded
generator, `caption` describes it in one of many ways, `render` paints a batch analytically (signed distances,
one pixel of anti-aliasing) on any torch device. `held_out` is the rule for what training never sees.

Lengths and places are fractions of the picture's side; x grows to the right, y grows downwards.

A caption may leave things out. Then the size is medium, the place is near the centre, the background of a single
object is white (black behind something white), and two objects stand side by side in reading order.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.11, 0.11),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.27, 0.86),
    "yellow": (0.98, 0.87, 0.10),
    "orange": (0.98, 0.52, 0.05),
    "purple": (0.50, 0.14, 0.66),
    "white": (0.98, 0.98, 0.98),
    "black": (0.05, 0.05, 0.05),
    "pink": (0.98, 0.56, 0.74),
    "brown": (0.47, 0.27, 0.12),
    "gray": (0.54, 0.54, 0.54),
    "cyan": (0.15, 0.82, 0.90),
}
# A colour of a LoRA (outlines.py): no caption of the miniature's own training names it, no tokenizer has its word.
PAINTS = {**COLOURS, "lime": (0.56, 0.80, 0.13)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "diamond", "hexagon", "cross", "heart")
SIZES = {"small": 0.1, "medium": 0.14, "large": 0.195}
NEAR, MIDDLE, FAR = 0.25, 0.5, 0.75
PLACES: dict[str, tuple[float, float]] = {
    "left": (NEAR, MIDDLE),
    "right": (FAR, MIDDLE),
    "top": (MIDDLE, NEAR),
    "bottom": (MIDDLE, FAR),
    "centre": (MIDDLE, MIDDLE),
    "top left": (NEAR, NEAR),
    "top right": (FAR, NEAR),
    "bottom left": (NEAR, FAR),
    "bottom right": (FAR, FAR),
}
RELATIONS = {  # the places of the first and the second object
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
OPPOSITE = (*RELATIONS.values(), *(p for a, b in (("top left", "bottom right"), ("top right", "bottom left"))
                                   for p in ((a, b), (b, a))))  # fmt: skip
SIZE_JITTER, PLACE_JITTER, LOOSE_JITTER = 0.04, 0.02, 0.06
MIN_CONTRAST = 0.30  # RGB distance between an object and any shade of its background


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. `place` is None where the caption says none, and `cell` the place that is meant all the same.

    `x, y, r` are what was drawn, and `jitter` how far each is from what is meant, -1..1 of what it may be.
    """

    shape: str
    colour: str
    size: str = "medium"
    place: str | None = None
    x: float = 0.5
    y: float = 0.5
    r: float = 0.14
    cell: str = "centre"
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things, how the first stands to the second (or None), and one (plain) or two (top, bottom) colours."""

    things: tuple[Thing, ...]
    background: tuple[str, ...] = ("white",)
    relation: str | None = None

    def key(self) -> str:
        """What the caption can say, and nothing else: the identity used by `held_out`."""
        said = (f"{t.size} {t.colour} {t.shape} {t.place}" for t in self.things)
        return f"{' | '.join(said)} | {self.relation} | {' to '.join(self.background)}"


# ---------------------------------------------------------------- what training never sees


def held_out_pair(colour: str, shape: str) -> bool:
    """One colour of each shape: (colour index + 5 * shape index) mod 12 == 7."""
    return (list(COLOURS).index(colour) + 5 * SHAPES.index(shape)) % 12 == 7


def held_out_pairing(a: Thing, b: Thing) -> bool:
    """About one in ten unordered pairings of two (colour, shape) objects, by a checksum of their names."""
    names = sorted(f"{t.colour} {t.shape}" for t in (a, b))
    return zlib.crc32(" + ".join(names).encode()) % 10 == 3


def held_out(scene: Scene) -> bool:
    """True for a scene that training must not see: a held-out pair, pairing, or one key in ten by checksum."""
    return (
        any(held_out_pair(t.colour, t.shape) for t in scene.things)
        or (len(scene.things) == 2 and held_out_pairing(*scene.things))
        or zlib.crc32(scene.key().encode()) % 10 == 0
    )


# ---------------------------------------------------------------- sampling


def contrast(colour: str, background: Sequence[str]) -> float:
    """Smallest RGB distance between a colour and the shades from background[0] to background[-1]."""
    a, b = PAINTS[background[0]], PAINTS[background[-1]]
    shades = (tuple(p + (q - p) * i / 8 for p, q in zip(a, b, strict=True)) for i in range(9))
    return min(math.dist(PAINTS[colour], shade) for shade in shades)


def default_background(colours: Sequence[str]) -> str:
    """The background of a caption that names none."""
    return next(c for c in ("white", "black", "gray") if c not in colours)


def _place(thing: tuple[str, str, str], said: bool, cell: str, rng: random.Random) -> Thing:
    shape, colour, size = thing
    (x, y), room = PLACES[cell], PLACE_JITTER if said or cell != "centre" else LOOSE_JITTER
    dx, dy, dr = jitter = tuple(rng.uniform(-1, 1) for _ in range(3))
    r = SIZES[size] * (1 + dr * SIZE_JITTER)
    return Thing(shape, colour, size, cell if said else None, x + dx * room, y + dy * room, r, cell, jitter)


def sample(rng: random.Random, things: int) -> Scene:
    """Draw a scene of one or two things, held out or not."""
    while True:
        looks = [(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES))) for _ in range(things)]
        colours = [look[1] for look in looks]
        kind = rng.random()
        if kind < 0.25:
            background = (default_background(colours),)
        else:
            background = tuple(rng.sample(list(COLOURS), 2 if kind > 0.8 else 1))
        if len({look[:2] for look in looks}) == things and min(contrast(c, background) for c in colours) > MIN_CONTRAST:
            break
    if things == 1:
        said = rng.random() < 0.7
        cell = rng.choice(list(PLACES)) if said else "centre"
        return Scene((_place(looks[0], said, cell, rng),), background)
    kind = rng.random()
    relation = rng.choice(list(RELATIONS)) if kind < 0.45 else None
    cells = RELATIONS[relation or "left of"] if kind < 0.65 else rng.choice(OPPOSITE)
    placed = (_place(look, kind >= 0.65, cell, rng) for look, cell in zip(looks, cells, strict=True))
    return Scene(tuple(placed), background, relation)


def sample_training(rng: random.Random, two: float = 0.6) -> Scene:
    """Draw a scene that training may see; `two` is the share of scenes with two things."""
    while True:
        scene = sample(rng, 2 if rng.random() < two else 1)
        if not held_out(scene):
            return scene


def sample_held_out(rng: random.Random, things: int) -> Scene:
    """Draw a scene that training never saw."""
    while True:
        scene = sample(rng, things)
        if held_out(scene):
            return scene


# ---------------------------------------------------------------- captions

SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big", "huge")}
PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the center", "in the middle"),
    **{c: (f"in the {c} corner", f"at the {c}", f"in the {c}") for c in list(PLACES)[5:]},
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    None: ("and", "and", "next to", "beside"),
}
PLAIN_WORDS = (
    "on a {} background",
    "on a {} background",
    "on {}",
    "against a {} background",
    "with a {} background",
)
GRADED_WORDS = ("on a {} to {} gradient background", "on a {} to {} gradient", "on a gradient from {} to {}",
                "on a gradient background from {} to {}", "with a {} to {} gradient background")  # fmt: skip
PREFIXES = ("a picture of ", "a drawing of ", "an image of ")


def _spell(colour: str, rng: random.Random) -> str:
    return "grey" if colour == "gray" and rng.random() < 0.5 else colour


def _noun(thing: Thing, rng: random.Random, article: bool) -> str:
    size = "" if thing.size == "medium" else rng.choice(SIZE_WORDS[thing.size]) + " "
    noun = f"{size}{_spell(thing.colour, rng)} {thing.shape}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if article else noun


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in one of many ways, in lower case (the tokenizers ignore case)."""
    article = rng.random() < 0.8
    nouns = [_noun(t, rng, article) for t in scene.things]
    parts = [f"{n} {rng.choice(PLACE_WORDS[t.place])}" if t.place else n
             for n, t in zip(nouns, scene.things, strict=True)]  # fmt: skip
    if len(parts) == 1:
        text = parts[0]
    elif scene.things[0].place:
        text = rng.choice(("{} and {}", "{}, {}")).format(*parts)
    else:
        text = f"{parts[0]} {rng.choice(RELATION_WORDS[scene.relation])} {parts[1]}"
    if article and rng.random() < 0.1:
        text = rng.choice(PREFIXES) + text

    names = [_spell(c, rng) for c in scene.background]
    default = scene.background == (default_background([t.colour for t in scene.things]),)
    if not (default and rng.random() < 0.5):
        how = rng.random()
        short = f"{' to '.join(names)}{' gradient' if len(names) == 2 else ''} background"
        if how < 0.15:
            text = f"{short}, {text}"
        elif how < 0.25:
            text = f"{text}, {short}"
        else:
            wording = rng.choice(PLAIN_WORDS if len(names) == 1 else GRADED_WORDS).format(*names)
            if wording.startswith("on a ") and names[0][0] in "aeiou" and "gradient" not in wording[:15]:
                wording = wording.replace("on a ", "on an ", 1)
            text = f"{text} {wording}"
    return text + ("." if rng.random() < 0.1 else "")


def words() -> list[str]:
    """Every word a caption can hold, for the tokenizers."""
    phrases = [*COLOURS, "grey", *SHAPES, *PREFIXES, *PLAIN_WORDS, *GRADED_WORDS, "a an and"]
    for table in (SIZE_WORDS, PLACE_WORDS, RELATION_WORDS):
        phrases += [phrase for phrases_ in table.values() for phrase in phrases_]
    return sorted({word for phrase in phrases for word in phrase.replace("{}", "").split()})


# ---------------------------------------------------------------- rendering: u, v are in units of the thing's r


def _polygon(vertices: Sequence[tuple[float, float]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Exact signed distance (negative inside) to a closed polygon."""

    def distance(u: Tensor, v: Tensor) -> Tensor:
        nearest = torch.full_like(u, 1e9)
        inside = torch.zeros_like(u, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(vertices, (*vertices[1:], vertices[0]), strict=True):
            ex, ey = bx - ax, by - ay
            along = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            nearest = torch.minimum(nearest, (u - ax - along * ex) ** 2 + (v - ay - along * ey) ** 2)
            crosses = (ay > v) != (by > v)
            inside = inside ^ (crosses & (u < ax + (v - ay) * (ex / ey if ey else 0.0)))
        return torch.where(inside, -1.0, 1.0) * nearest.sqrt()

    return distance


def _regular(count: int, radius: float, start: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` is given, with its bounding box centred."""
    total = count * (2 if inner else 1)
    radii = [inner if inner and i % 2 else radius for i in range(total)]
    corners = [(r * math.sin(start + 2 * math.pi * i / total), -r * math.cos(start + 2 * math.pi * i / total))
               for i, r in enumerate(radii)]  # fmt: skip
    mid_y = (min(y for _, y in corners) + max(y for _, y in corners)) / 2
    return [(x, y - mid_y) for x, y in corners]


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 1.0


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.78).abs() - 0.22


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner with a disc on each upper edge."""
    half = 0.64  # half the square's edge; the constants below centre the bounding box
    offset = half / math.sqrt(2)
    top, bottom = -offset - half, 2 * offset
    v = v + (top + bottom) / 2
    a, b = (u + v) / math.sqrt(2), (v - u) / math.sqrt(2)
    qa, qb = a.abs() - half, b.abs() - half
    square = torch.hypot(qa.clamp(min=0), qb.clamp(min=0)) + torch.maximum(qa, qb).clamp(max=0)
    discs = torch.hypot(u.abs() - offset, v + offset) - half
    return torch.minimum(square, discs)


_ARM = 0.34
Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCE: dict[str, Distance] = {
    "circle": _circle,
    "square": _polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]),
    "triangle": _polygon(_regular(3, 1.18, 0.0)),
    "star": _polygon(_regular(5, 1.08, 0.0, 0.45)),
    "ring": _ring,
    "diamond": _polygon([(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)]),
    "hexagon": _polygon(_regular(6, 1.03, math.pi / 6)),
    "cross": _polygon([(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
                       (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]),
    "heart": _heart,
}  # fmt: skip
COLUMNS = 7  # shape, x, y, r, red, green, blue
ABSENT = len(COLOURS)  # above every class that is there


def pack(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes as numbers: things [B, 2, 7] (shape -1 where there is none) and background top and bottom [B, 2, 3]."""
    absent = [-1.0] + [0.0] * (COLUMNS - 1)
    rows = [[[SHAPES.index(t.shape), t.x, t.y, t.r, *PAINTS[t.colour]] for t in s.things] + [absent] for s in scenes]
    things = torch.tensor([row[:2] for row in rows])
    background = torch.tensor([[PAINTS[s.background[0]], PAINTS[s.background[-1]]] for s in scenes])
    return things, background


def meaning(scenes: Sequence[Scene]) -> Tensor:
    """What a caption means, as class numbers [B, 10]: shape, colour, size and cell of both things, the background.

    Where there is no second thing its four are `ABSENT`.
    """
    names = (SHAPES, tuple(COLOURS), tuple(SIZES), tuple(PLACES))
    rows = []
    for scene in scenes:
        row = [table.index(name) for t in scene.things
               for table, name in zip(names, (t.shape, t.colour, t.size, t.cell), strict=True)]  # fmt: skip
        row += [ABSENT] * (8 - len(row))
        rows.append(row + [names[1].index(scene.background[end]) for end in (0, -1)])
    return torch.tensor(rows)


def jitter(scenes: Sequence[Scene]) -> Tensor:
    """What no caption says, [B, 6] in -1..1: exact x, y and r of both things; zero if there is no second one."""
    return torch.tensor([[j for t in s.things for j in t.jitter] + [0.0] * (3 * (2 - len(s.things))) for s in scenes])


def render_packed(things: Tensor, background: Tensor, side: int, distance: Mapping[str, Distance] = DISTANCE) -> Tensor:
    """Paint what `pack` returned, on its device: [B, side, side, 3] in 0..1."""
    centres = (torch.arange(side, device=things.device, dtype=torch.float32) + 0.5) / side
    fade = centres[None, :, None, None]
    top, bottom = background[:, 0, None, None], background[:, 1, None, None]
    picture = (top + (bottom - top) * fade).expand(-1, -1, side, -1).contiguous()
    for i in range(things.shape[1]):
        for index, shape in enumerate(SHAPES):
            rows = (things[:, i, 0] == index).nonzero()[:, 0]
            if not len(rows):
                continue
            _, x, y, r, *rgb = things[rows, i].unbind(-1)
            u = (centres[None, None, :] - x[:, None, None]) / r[:, None, None]
            v = (centres[None, :, None] - y[:, None, None]) / r[:, None, None]
            pixels = distance[shape](*torch.broadcast_tensors(u, v)) * r[:, None, None] * side
            alpha = (0.5 - pixels).clamp(0, 1)[..., None]
            picture[rows] = torch.lerp(picture[rows], torch.stack(rgb, -1)[:, None, None], alpha)
    return picture


def render(scenes: Sequence[Scene], side: int = 128, device: str | torch.device = "cpu") -> Tensor:
    """Paint scenes: [B, side, side, 3] in 0..1."""
    things, background = pack(scenes)
    return render_packed(things.to(device), background.to(device), side)
