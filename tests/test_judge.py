"""The judge accepts what scenes look like and rejects everything that differs from what was said."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import judge
import scenes
from scenes import Scene, Thing

RED = Thing("circle", "red", place="left", x=0.25)
BLUE = Thing("square", "blue", place="right", x=0.75)
ONE = Scene((RED,), ("white",))
TWO = Scene((replace(RED, place=None), replace(BLUE, place=None)), ("white",), "left of")


def picture(scene: Scene) -> torch.Tensor:
    return scenes.render([scene], side=128)[0]


def blurred(seen: torch.Tensor) -> torch.Tensor:
    planes = rearrange(seen, "h w c -> c 1 h w")
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    return rearrange(F.conv2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), kernel), "c 1 h w -> h w c")


@pytest.mark.parametrize("spoil", ["clean", "noise", "blur"])
def test_rendered_scenes_are_right(spoil: str) -> None:
    rng = random.Random(5)
    torch.manual_seed(5)
    right = 0
    for i in range(100):
        scene = scenes.sample(rng, 1 + i % 2)
        seen = picture(scene)
        if spoil == "noise":
            seen = (seen + 0.02 * torch.randn_like(seen)).clamp(0, 1)
        if spoil == "blur":
            seen = blurred(seen)
        right += judge.matches(seen, scene).ok
    assert right >= 98


@pytest.mark.parametrize("change", [
    {"colour": "green"}, {"shape": "hexagon"}, {"shape": "ring"},
    {"size": "large", "r": 0.195}, {"x": 0.75}, {"y": 0.75},
])  # fmt: skip
def test_one_wrong_property_is_rejected(change: dict) -> None:
    assert judge.matches(picture(ONE), ONE).ok
    assert not judge.matches(picture(replace(ONE, things=(replace(RED, **change),))), ONE).ok


@pytest.mark.parametrize("background", [("gray",), ("pink",), ("white", "blue")])
def test_a_wrong_background_is_rejected(background: tuple[str, ...]) -> None:
    assert not judge.matches(picture(replace(ONE, background=background)), ONE).ok


def test_wrong_counts_and_swapped_objects_are_rejected() -> None:
    assert judge.matches(picture(TWO), TWO).ok
    assert not judge.matches(picture(TWO), ONE).ok
    assert not judge.matches(picture(ONE), TWO).ok
    swapped = (replace(RED, x=0.75), replace(BLUE, x=0.25))
    assert not judge.matches(picture(replace(TWO, things=swapped)), TWO).ok
    colours = (replace(RED, colour="blue"), replace(BLUE, colour="red"))
    assert not judge.matches(picture(replace(TWO, things=colours)), TWO).ok


@pytest.mark.parametrize("seen", [
    torch.ones(128, 128, 3), torch.zeros(128, 128, 3),
    torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0)),
    torch.full((128, 128, 3), float("nan")),
], ids=["white", "black", "noise", "nan"])  # fmt: skip
def test_no_picture_is_no_scene(seen: torch.Tensor) -> None:
    assert not judge.matches(seen, ONE).ok
    assert not judge.matches(seen, TWO).ok
