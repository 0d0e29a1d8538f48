"""The plots, looked at as pictures: not empty, labelled, in their colours."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from vortex_core.bench import plot_style
from vortex_core.bench.plot_style import COLOURS, HEIGHT, STOP, WARN, WIDTH, Median

MEDIANS = [Median(f"run {i}", 10 + i, 9 + i, 12 + i, special=i == 1) for i in range(3)]
FIGURES = {
    "histogram": (
        plot_style.histogram("a title", [1.0, 2.0, 2.1, 9.0], [(2.0, "P50"), (9.0, "P99")], "milliseconds"),
        ["a title", "milliseconds", "pictures", "P50", "P99"],
        [COLOURS[0], COLOURS[1], COLOURS[2]],
    ),
    "timeline": (
        plot_style.timeline(
            "a title", {"reserved": [(0, 1), (1, 3)], "process": [(0, 2), (1, 4)], "none": []},
            [(3.5, "limit", STOP)], moments=[(0.5, "loaded")],
        ),
        ["a title", "seconds", "GB", "reserved", "process", "limit", "loaded"],
        [COLOURS[0], COLOURS[1], STOP],
    ),
    "stacks": (
        plot_style.stacks("a title", {"cached": {"step 1": 3.0, "decode": 1.0}, "cold": {"prompt": 2.0}}, "ms"),
        ["a title", "ms", "cached", "cold", "step 1", "decode", "prompt"],
        [COLOURS[0], COLOURS[1], COLOURS[2]],
    ),
    "trend": (
        plot_style.trend("a title", MEDIANS, "ms", "baseline"),
        ["a title", "ms", "run 0", "run 2", "baseline"],
        [COLOURS[0], WARN],
    ),
}  # fmt: skip


def pixels_near(image: np.ndarray, colour: str) -> int:
    return int((np.abs(image.astype(int) - np.array(to_rgb(colour)) * 255).max(axis=-1) < 12).sum())


@pytest.mark.parametrize("name", FIGURES)
def test_plots_show_their_values_and_say_what_they_are(name: str, tmp_path: Path) -> None:
    figure, words, colours = FIGURES[name]
    plot_style.save(figure, tmp_path / name)
    with Image.open(tmp_path / f"{name}.png") as picture:
        image = np.asarray(picture.convert("RGB"))
    assert image.shape == (HEIGHT, WIDTH, 3)
    for colour in colours:
        assert pixels_near(image, colour) > 30, colour
    drawing = (tmp_path / f"{name}.svg").read_text()
    said = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    assert {word.strip() for word in words} <= {word.strip() for word in said}
    assert sum(bool(re.fullmatch(r"[\d.]+", word)) for word in said) >= 3  # ticks
    assert np.array_equal(plot_style.pixels(figure), image)


def test_nothing_measured_is_said() -> None:
    empty = plot_style.timeline("a title", {"reserved": []})
    assert "nothing was measured" in [text.get_text() for text in empty.axes[0].texts]


def test_saving_again_writes_the_same_file(tmp_path: Path) -> None:
    figure: Figure = FIGURES["stacks"][0]
    plot_style.save(figure, tmp_path / "a")
    plot_style.save(figure, tmp_path / "b")
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
