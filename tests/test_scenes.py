"""Scenes repeat from a seed, keep what is held out apart, and say what they draw."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import scenes


def test_sampling_repeats_from_a_seed() -> None:
    first, second = ([scenes.sample_training(random.Random(s)) for s in range(20)] for _ in range(2))
    assert first == second


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(0)
    assert not any(scenes.held_out(scenes.sample_training(rng)) for _ in range(300))


def test_one_colour_of_each_shape_is_held_out() -> None:
    pairs = [(c, s) for s in scenes.SHAPES for c in scenes.COLOURS if scenes.held_out_pair(c, s)]
    assert sorted(s for _, s in pairs) == sorted(scenes.SHAPES)


@pytest.mark.parametrize("things", [1, 2])
def test_caption_names_every_object_and_holds_known_words(things: int) -> None:
    rng, known = random.Random(things), set(scenes.words())
    for _ in range(100):
        scene = scenes.sample(rng, things)
        text = scenes.caption(scene, rng)
        assert all(t.shape in text for t in scene.things)
        assert set(text.replace(",", "").replace(".", "").split()) <= known


def test_objects_stand_out_from_their_background() -> None:
    rng = random.Random(3)
    drawn = [scenes.sample(rng, 2) for _ in range(100)]
    assert all(scenes.contrast(t.colour, s.background) > scenes.MIN_CONTRAST for s in drawn for t in s.things)


def test_rendering_is_in_range_and_shows_the_colours() -> None:
    thing = scenes.Thing("square", "red")
    picture = scenes.render([scenes.Scene((thing,), ("white",))], side=64)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert torch.allclose(picture[0, 32, 32], torch.tensor(scenes.COLOURS["red"]))
    assert torch.allclose(picture[0, 1, 1], torch.tensor(scenes.COLOURS["white"]))
