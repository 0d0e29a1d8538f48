"""Names what a picture of a scene shows, by rules alone: no learning, no randomness.

The background is a plane fitted through the picture's rim. What differs from it is cut into connected pieces. Each
piece is named by its median colour, by the template that it overlaps best (the renderer's own shapes, at the piece's
own box), by its extent and by its cell in a 3 x 3 grid. `matches` then checks everything that the caption says and
nothing more: the number of objects, each with its shape, colour, size and place, and the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
from scenes import DISTANCE, PAINTS, PLACES, SIZES, Scene, Thing
from torch import Tensor

DIFFERENT = 0.12  # largest channel difference from the background that still counts as background
NAME_RADIUS = 0.20  # RGB distance within which a colour has its name
MIN_AREA, MAX_DIRT = 0.0015, 0.003  # of the picture: smallest object, most specks in all
MIN_OVERLAP, MIN_LEAD = 0.74, 0.015  # intersection over union with the best template, lead over the second
MIN_UNIFORM = 0.85  # share of an object's inside that has the object's colour
CELL = (0.38, 0.62)  # borders of the 3 x 3 grid of places
APART, ALIGNED = 0.2, 0.2  # "left of": at least so far left, at most so far up or down
GRID, REACH = 96, 1.2  # template resolution and half-width in units of r


@dataclass(frozen=True, slots=True)
class Found:
    """One object seen. Names are None where nothing fits; x, y, r are fractions of the side."""

    shape: str | None
    colour: str | None
    size: str
    place: str
    x: float
    y: float
    r: float
    overlap: float


@dataclass(frozen=True, slots=True)
class Seen:
    """Objects, the background's top and bottom colour (None: no such thing), and the share of specks."""

    things: tuple[Found, ...]
    background: tuple[str | None, str | None]
    dirt: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture shows a scene, and if not, why."""

    ok: bool
    reasons: tuple[str, ...] = ()


def name_colour(rgb: np.ndarray) -> str | None:
    """The palette's name for a colour, or None if it is close to none."""
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in PAINTS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= NAME_RADIUS else None


def fit_background(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A plane in each channel through the rim: as a picture, its (1, x, y) terms, the share of the rim on it."""
    height, width, _ = picture.shape
    rim = max(2, height // 64)
    y, x = np.mgrid[0:height, 0:width]
    basis = np.stack([np.ones_like(x, float), (x + 0.5) / width, (y + 0.5) / height], -1)
    edge = (x < rim) | (y < rim) | (x >= width - rim) | (y >= height - rim)
    rows, values = basis[edge], picture[edge]
    keep = np.ones(len(rows), bool)
    for _ in range(4):
        plane = np.linalg.lstsq(rows[keep], values[keep], rcond=None)[0]
        error = np.abs(rows @ plane - values).max(-1)
        keep = error <= max(DIFFERENT / 2, float(np.median(error)))
    return basis @ plane, plane, float((error <= DIFFERENT).mean())


def components(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected pieces of a mask as [n, 2] arrays of (row, column), by joining the rows' runs."""
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    rows, starts = np.nonzero(np.diff(padded, axis=1) == 1)
    _, ends = np.nonzero(np.diff(padded, axis=1) == -1)
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
    for row in range(1, mask.shape[0]):
        above, here = first[row - 1], first[row]
        while above < first[row] and here < first[row + 1]:
            if starts[above] < ends[here] and starts[here] < ends[above]:
                parent[root(here)] = root(int(above))
            if ends[above] < ends[here]:
                above += 1
            else:
                here += 1
    pieces: dict[int, list[np.ndarray]] = {}
    for i, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        run = np.stack([np.full(end - start, row), np.arange(start, end)], -1)
        pieces.setdefault(root(i), []).append(run)
    return [np.concatenate(runs) for runs in pieces.values()]


@cache
def _templates() -> dict[str, tuple[np.ndarray, float, float]]:
    """Each shape's mask on a grid over [-REACH, REACH], with its half width and half height in units of r."""
    fine = (torch.arange(GRID) + 0.5) / GRID * 2 * REACH - REACH
    v, u = torch.meshgrid(fine, fine, indexing="ij")
    dense = torch.linspace(-REACH, REACH, 961)
    dv, du = torch.meshgrid(dense, dense, indexing="ij")
    result = {}
    for shape, distance in DISTANCE.items():
        inside = distance(du, dv) < 0
        half = (float(dense[inside.any(axis)].abs().max()) for axis in (0, 1))
        result[shape] = ((distance(u, v) < 0).numpy(), *half)
    return result


def _name_shape(mask: np.ndarray, box: tuple[float, float, float, float]) -> tuple[str | None, float, float]:
    """The best template for a mask with the box (left, top, right, bottom): its name, r in pixels, the overlap."""
    left, top, right, bottom = box
    grid = (np.arange(GRID) + 0.5) / GRID * 2 * REACH - REACH
    scores: dict[str, tuple[float, float]] = {}
    for shape, (template, half_width, half_height) in _templates().items():
        r = ((right - left) / half_width + (bottom - top) / half_height) / 4
        columns = np.floor((left + right) / 2 + grid * r).astype(int)
        rows = np.floor((top + bottom) / 2 + grid * r).astype(int)
        valid = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
        seen = mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)] & valid
        scores[shape] = (float((seen & template).sum() / (seen | template).sum()), r)
    ranked = sorted(scores, key=lambda s: -scores[s][0])
    (overlap, r), second = scores[ranked[0]], scores[ranked[1]][0]
    named = overlap >= MIN_OVERLAP and overlap - second >= MIN_LEAD
    return ranked[0] if named else None, r, overlap


def _third(value: float) -> int:
    return int(value > CELL[0]) + int(value > CELL[1])


def _cell(x: float, y: float) -> str:
    return next(place for place, (u, v) in PLACES.items() if (_third(u), _third(v)) == (_third(x), _third(y)))


def _look(picture: np.ndarray, background: np.ndarray, piece: np.ndarray) -> Found:
    height, width, _ = picture.shape
    (top, left), (bottom, right) = piece.min(0), piece.max(0) + 1
    window = (slice(max(top - 2, 0), bottom + 2), slice(max(left - 2, 0), right + 2))
    pixels, behind = picture[piece[:, 0], piece[:, 1]], background[piece[:, 0], piece[:, 1]]
    away = np.abs(pixels - behind).max(-1)
    core = pixels[away >= np.quantile(away, 0.4)]
    rgb = np.median(core, axis=0)

    own = np.zeros(picture.shape[:2], bool)
    own[piece[:, 0], piece[:, 1]] = True
    step = rgb - background[window]
    alpha = ((picture[window] - background[window]) * step).sum(-1) / np.maximum((step**2).sum(-1), 1e-6)
    mask = own[window] & (alpha > 0.5)
    if not mask.any():
        mask = own[window]
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    inside = picture[window][inner] if inner.any() else pixels
    uniform = float((np.abs(inside - rgb).max(-1) < NAME_RADIUS).mean()) >= MIN_UNIFORM

    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    shape, r, overlap = _name_shape(mask, box)
    x = (window[1].start + (box[0] + box[2]) / 2) / width
    y = (window[0].start + (box[1] + box[3]) / 2) / height
    r = float(r) / height
    size = min(SIZES, key=lambda s: abs(np.log(SIZES[s] / r)))
    colour = name_colour(rgb) if uniform else None
    return Found(shape, colour, size, _cell(x, y), float(x), float(y), r, overlap)


def judge(picture: np.ndarray | Tensor) -> Seen:
    """Name what a picture [H, W, 3] in 0..1 shows."""
    picture = np.asarray(picture, dtype=np.float64)
    if not np.isfinite(picture).all():
        return Seen((), (None, None), 1.0)
    background, plane, on_plane = fit_background(picture)
    flat = on_plane > 0.9 and np.abs(plane[1]).max() < 0.15
    ends = (name_colour(plane[0] + plane[1] / 2), name_colour(plane[0] + plane[1] / 2 + plane[2]))
    mask = np.abs(picture - background).max(-1) > DIFFERENT
    if not flat or mask.mean() > 0.6:
        return Seen((), ends if flat else (None, None), float(mask.mean()))
    pieces = components(mask)
    area = picture.shape[0] * picture.shape[1]
    things = [_look(picture, background, p) for p in pieces if len(p) >= MIN_AREA * area]
    dirt = sum(len(p) for p in pieces if len(p) < MIN_AREA * area) / area
    return Seen(tuple(sorted(things, key=lambda t: t.x)), ends, dirt)


def _compare(found: Found, said: Thing) -> list[str]:
    pairs = [
        ("shape", found.shape, said.shape),
        ("colour", found.colour, said.colour),
        ("size", found.size, said.size),
    ]
    if said.place is not None:
        pairs.append(("place", found.place, said.place))
    return [f"{what} is {is_}, not {should}" for what, is_, should in pairs if is_ != should]


def _related(a: Found, b: Found, relation: str | None) -> bool:
    right, down = b.x - a.x, b.y - a.y
    along, across = {"left of": (right, down), "right of": (-right, down), "above": (down, right),
                     "below": (-down, right), None: (1.0, 0.0)}[relation]  # fmt: skip
    return along >= APART and abs(across) <= ALIGNED


def matches(picture: np.ndarray | Tensor, scene: Scene) -> Verdict:
    """Whether a picture shows all that a scene's caption says, and nothing else."""
    seen = judge(picture)
    reasons = []
    wanted = (scene.background[0], scene.background[-1])
    if seen.background != wanted:
        reasons.append(f"background is {seen.background}, not {wanted}")
    if seen.dirt > MAX_DIRT:
        reasons.append(f"specks cover {seen.dirt:.1%}")
    if len(seen.things) != len(scene.things):
        return Verdict(False, (*reasons, f"{len(seen.things)} objects, not {len(scene.things)}"))

    def faults(order: Sequence[Found]) -> list[str]:
        wrong = [w for f, t in zip(order, scene.things, strict=True) for w in _compare(f, t)]
        if len(order) == 2 and not _related(order[0], order[1], scene.relation):
            wrong.append(f"the first is not {scene.relation} the second")
        return wrong

    reasons += min((faults(order) for order in permutations(seen.things)), key=len)
    return Verdict(not reasons, tuple(reasons))
