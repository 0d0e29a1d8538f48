"""Judges pictures in outlines (outlines.py): is each thing hollow, and does the picture show its scene?

Each outline is found and filled with its line's colour. The filled picture then goes to `judge`, which knows nothing of
the style. So whatever it checks in other pictures, it checks in these. A line's colour is its median.

A thing is an outline if the background shows in `HOLLOW` of what its line encloses, and of the part near the line. By
that part a filled ring is no outline of a circle. An outline of a ring is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import judge
import numpy as np
from outlines import LINE
from scenes import Scene
from torch import Tensor

HOLLOW = 0.5  # least share that is nearer to the background than to the line's colour; filled things have at most 0.1
CLEAR, NEAR = 0.06, 0.24  # in units of r: what is so near to the line counts for neither, and what is "near the line"


@dataclass(frozen=True, slots=True)
class Outlines:
    """A picture with its outlines filled [H, W, 3], and the share of each thing's inside that shows the background."""

    filled: np.ndarray
    hollow: tuple[float, ...]

    @property
    def ok(self) -> bool:
        """Whether there are things, and all of them are outlines."""
        return bool(self.hollow) and min(self.hollow) >= HOLLOW


def enclosed(line: np.ndarray) -> np.ndarray:
    """The line and all that no path from the mask's rim reaches without crossing it."""
    free = np.pad(~line, 1, constant_values=True)
    outside = next(piece for piece in judge.components(free) if (piece == 0).all(1).any())
    result = np.ones_like(free)
    result[outside[:, 0], outside[:, 1]] = False
    return result[1:-1, 1:-1]


def _joined(pieces: list[np.ndarray]) -> list[np.ndarray]:
    """Pieces whose box lies within another's box become part of it: both circles of a ring are one thing."""
    result: list[np.ndarray] = []
    for piece in sorted(pieces, key=lambda p: -np.prod(np.ptp(p, axis=0) + 1)):
        for i, host in enumerate(result):
            if (host.min(0) <= piece.min(0)).all() and (piece.max(0) <= host.max(0)).all():
                result[i] = np.concatenate([host, piece])
                break
        else:
            result.append(piece)
    return result


def _fill(picture: np.ndarray, background: np.ndarray, piece: np.ndarray) -> float:
    """Fill one outline in `picture`, in place; returns how hollow it was."""
    (top, left), (bottom, right) = piece.min(0), piece.max(0) + 1
    window = slice(top, bottom), slice(left, right)
    seen, behind = picture[window], background[window]
    away = np.abs(picture - background).max(-1)[piece[:, 0], piece[:, 1]]
    rgb = np.median(picture[piece[:, 0], piece[:, 1]][away >= np.quantile(away, 0.4)], axis=0)
    step = rgb - behind
    line = ((seen - behind) * step).sum(-1) / np.maximum((step**2).sum(-1), 1e-6) > 0.5
    visible = np.zeros_like(line)
    visible[piece[:, 0] - top, piece[:, 1] - left] = True
    solid = enclosed(visible)
    depth = _depth(solid) / (max(line.shape) / 2)
    inside = depth > LINE + CLEAR
    near = inside & (depth <= LINE + NEAR)
    hollow = min(float((~line[part]).mean()) for part in (inside, near)) if near.any() else 0.0
    seen[line | (solid & ~visible) | inside] = rgb
    return hollow


def _depth(solid: np.ndarray) -> np.ndarray:
    """How far, in pixels, each of a mask's pixels lies inside it; 0 for the others."""
    padded = np.pad(solid, 1)
    out, points = np.argwhere(~padded), np.argwhere(padded)
    result = np.zeros(padded.shape)
    result[tuple(points.T)] = np.sqrt(np.square(points[:, None] - out[None]).sum(-1).min(1)) - 0.5
    return result[1:-1, 1:-1]


def outlines(picture: np.ndarray | Tensor) -> Outlines:
    """Find the outlines in a picture [H, W, 3] in 0..1, and fill them."""
    picture = np.asarray(picture, dtype=np.float64).copy()
    if not np.isfinite(picture).all():
        return Outlines(picture, ())
    background = judge.fit_background(picture)[0]
    away = np.abs(picture - background).max(-1)
    least = judge.MIN_AREA * picture.shape[0] * picture.shape[1]
    pieces = [p for p in _joined(judge.components(away > judge.DIFFERENT)) if len(p) >= least]
    return Outlines(picture, tuple(_fill(picture, background, piece) for piece in pieces))


def matches(picture: np.ndarray | Tensor, scene: Scene) -> judge.Verdict:
    """Whether a picture shows all that a scene's caption says, in outlines, and nothing else."""
    found = outlines(picture)
    things = tuple(replace(t, shape="circle") if t.shape == "ring" else t for t in scene.things)
    verdict = judge.matches(found.filled, replace(scene, things=things))
    reasons = verdict.reasons if found.ok else ("style is filled, not outlined", *verdict.reasons)
    return judge.Verdict(not reasons, reasons)
