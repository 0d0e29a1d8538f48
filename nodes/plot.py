"""Two small plots, drawn with Pillow, which every ComfyUI has: a timeline and a histogram, as IMAGE tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from torch import Tensor

WIDTH, HEIGHT = 960, 480
LEFT, TOP, RIGHT, BOTTOM = 76, 84, 28, 56  # margins
PAPER, INK, SOFT, GRID = "#ffffff", "#1c2530", "#67727e", "#e6e9ed"
COLOURS = ("#2463eb", "#0d9488", "#d97706", "#9333ea")
WARN, STOP = "#d97706", "#dc2626"
Point = tuple[float, float]


class Canvas:
    """A titled sheet with axes; `place` turns values into pixels."""

    def __init__(self, title: str, x: tuple[float, float], y: tuple[float, float], labels: tuple[str, str]) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        self.draw: ImageDraw = ImageDraw.Draw(self.image)
        self.x, self.y = x, y
        self.text((LEFT, 18), title, INK, 20)
        for value in ticks(*y):
            row = self.place(x[0], value)[1]
            self.draw.line((LEFT, row, WIDTH - RIGHT, row), GRID)
            self.text((LEFT - 10, row), f"{value:g}", SOFT, 14, "rm")
        for value in ticks(*x):
            column = self.place(value, y[0])[0]
            self.draw.line((column, HEIGHT - BOTTOM, column, HEIGHT - BOTTOM + 5), SOFT)
            self.text((column, HEIGHT - BOTTOM + 10), f"{value:g}", SOFT, 14, "mt")
        self.draw.line((LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), SOFT)
        self.text((WIDTH - RIGHT, HEIGHT - 8), labels[0], SOFT, 14, "rb")
        self.text((14, TOP - 12), labels[1], SOFT, 14, "lb")

    def place(self, x: float, y: float) -> Point:
        """Pixels of a value."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def text(self, at: Point, text: str, colour: str, size: int, anchor: str = "la") -> None:
        """Text in Pillow's own font, which is always there."""
        from PIL import ImageFont

        self.draw.text(at, text, colour, font=ImageFont.load_default(size), anchor=anchor)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Names beside their colours, in a row below the title."""
        from PIL import ImageFont

        x = float(LEFT)
        for name, colour in entries:
            self.draw.rectangle((x, 57, x + 14, 61), colour)
            self.text((x + 20, 59), name, SOFT, 14, "lm")
            x += 20 + self.draw.textlength(name, font=ImageFont.load_default(14)) + 24

    def level(self, value: float, name: str, colour: str) -> None:
        """A dashed line across, with its name."""
        row = self.place(0, value)[1]
        for x in range(LEFT, WIDTH - RIGHT, 12):
            self.draw.line((x, row, x + 6, row), colour, 2)
        self.text((WIDTH - RIGHT, row - 3), name, colour, 14, "rb")

    def tensor(self) -> Tensor:
        """IMAGE, `[1, H, W, 3]` in 0..1."""
        import numpy as np
        import torch

        return torch.from_numpy(np.asarray(self.image).astype(np.float32) / 255)[None]


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers from `low` to `high`."""
    rough = (high - low) / wanted
    step = 10 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def timeline(
    title: str,
    series: dict[str, Sequence[Point]],
    levels: Sequence[tuple[float, str, str]] = (),
    labels: tuple[str, str] = ("seconds", "GB"),
) -> Tensor:
    """Lines of `(x, y)` over time; `levels` are `(y, name, colour)`. Says so where there is nothing to draw."""
    points = [point for line in series.values() for point in line]
    top = max([y for _, y in points] + [y for y, _, _ in levels], default=0)
    canvas = Canvas(title, (0, max((x for x, _ in points), default=0) or 1), (0, top * 1.12 or 1), labels)
    entries = []
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        if line:
            entries.append((name, colour))
            pixels = [canvas.place(*point) for point in line]
            if len(pixels) == 1:  # one sample is a level, too
                pixels = [pixels[0], (WIDTH - RIGHT, pixels[0][1])]
            canvas.draw.line(pixels, colour, 3, joint="curve")
    for level in levels:
        canvas.level(*level)
    canvas.legend(entries)
    if not points:
        canvas.text((WIDTH / 2, HEIGHT / 2), "nothing was measured", SOFT, 20, "mm")
    return canvas.tensor()


def histogram(title: str, samples: Sequence[float], marks: Sequence[tuple[float, str]], label: str) -> Tensor:
    """Counts of samples in equal bins, with `(value, name)` marks."""
    low, high = min(samples), max(samples)
    spread = (high - low) or high * 0.1 or 1.0
    bins = min(30, max(5, math.ceil(2 * math.sqrt(len(samples)))))
    counts = [0] * bins
    for sample in samples:
        counts[min(bins - 1, int((sample - low) / spread * bins))] += 1
    canvas = Canvas(title, (low - spread * 0.05, low + spread * 1.05), (0, max(counts) * 1.25), (label, "runs"))
    for i, count in enumerate(counts):
        if count:
            left, top = canvas.place(low + spread * i / bins, count)
            right, bottom = canvas.place(low + spread * (i + 1) / bins, 0)
            canvas.draw.rectangle((left + 1, top, right - 1, bottom - 1), COLOURS[0])
    colours = (*COLOURS[1:], STOP)
    for (value, _), colour in zip(marks, colours, strict=False):
        column = canvas.place(value, 0)[0]
        canvas.draw.line((column, TOP, column, HEIGHT - BOTTOM), colour, 2)
    canvas.legend([(name, colour) for (_, name), colour in zip(marks, colours, strict=False)])
    return canvas.tensor()
