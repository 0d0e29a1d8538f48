"""The miniature's LoRA: its file, its judge, and pictures with its update added by hand."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import evaluate
import judge
import judge_outlines
import outlines
import pytest
import scenes
import tiny_model as tm
import torch
import train_lora
from safetensors.torch import load_file
from scenes import Scene, Thing

RED = Thing("circle", "red", place="left", x=0.25)
ONE = Scene((RED,), ("white",))


def picture(scene: Scene) -> torch.Tensor:
    return outlines.render([scene])[0]


# ---------------------------------------------------------------- the judge


def test_outlines_are_right_and_filled_things_are_none() -> None:
    rng = random.Random(5)
    drawn = [scenes.sample(rng, 1 + i % 2) for i in range(30)] + [outlines.sample_training(rng, 1.0) for _ in range(10)]
    lines, filled = outlines.render(drawn), scenes.render(drawn)
    assert all(judge_outlines.matches(seen, scene).ok for seen, scene in zip(lines, drawn, strict=True))
    assert not any(judge_outlines.outlines(seen).ok for seen in filled)
    assert not any(judge.matches(seen, scene).ok for seen, scene in zip(lines, drawn, strict=True))


def test_a_filled_ring_is_no_outline_of_a_circle() -> None:
    ring = Scene((replace(RED, shape="ring"),))
    assert judge_outlines.matches(picture(ring), ring).ok
    assert not judge_outlines.outlines(scenes.render([ring])[0]).ok


def test_one_outline_of_two_is_not_the_style() -> None:
    things = (replace(RED, place=None), Thing("square", "blue", x=0.75))
    lines, filled = outlines.render([Scene(things)])[0], scenes.render([Scene(things)])[0]
    mixed = torch.cat([lines[:, :64], filled[:, 64:]], 1)
    assert judge_outlines.outlines(lines).ok
    assert not judge_outlines.outlines(mixed).ok


@pytest.mark.parametrize("change", [
    {"colour": "green"}, {"shape": "hexagon"}, {"shape": "heart"},
    {"size": "large", "r": 0.195}, {"x": 0.75}, {"y": 0.75},
])  # fmt: skip
def test_one_wrong_property_of_an_outline_is_rejected(change: dict) -> None:
    assert judge_outlines.matches(picture(ONE), ONE).ok
    assert not judge_outlines.matches(picture(replace(ONE, things=(replace(RED, **change),))), ONE).ok


@pytest.mark.parametrize("seen", [
    torch.ones(128, 128, 3), torch.zeros(128, 128, 3),
    torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0)),
    torch.full((128, 128, 3), float("nan")),
], ids=["white", "black", "noise", "nan"])  # fmt: skip
def test_no_picture_has_no_outlines(seen: torch.Tensor) -> None:
    assert not judge_outlines.outlines(seen).ok
    assert not judge_outlines.matches(seen, ONE).ok


def test_lime_changes_no_other_name() -> None:
    """What has a name in the old palette is nearer to that colour than to lime, so old scores stay as they are."""
    new = set(scenes.PAINTS) - set(scenes.COLOURS)
    assert new == {outlines.COLOUR}
    lime = scenes.PAINTS[outlines.COLOUR]
    assert min(math.dist(lime, colour) for colour in scenes.COLOURS.values()) > 2 * judge.NAME_RADIUS
    assert outlines.COLOUR not in scenes.words()  # the tokenizers stay as they are, too


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(0)
    drawn = [outlines.sample_training(rng, 0.5) for _ in range(200)]
    lime = [s for s in drawn if outlines.COLOUR in (*s.background, *(t.colour for t in s.things))]
    assert 60 < len(lime) < 140
    assert not any(outlines.held_out(s) for s in lime)
    assert not any(scenes.held_out(s) for s in drawn if s not in lime)
    assert all(outlines.held_out(scene) for scene, _ in evaluate.never_seen_lime(20))


def test_what_is_scored_is_neither_in_training_nor_among_what_the_rule_was_set_with() -> None:
    rng = random.Random(1)
    drawn = [train_lora.sample(rng, 0.4) for _ in range(2000)]
    assert (
        sum(any(t.shape in train_lora.HARD for t in s.things) for s in drawn) > 1000
    )  # 0.35 of all, and 0.4 of the rest
    old = [scene for things in (1, 2) for scene, _ in evaluate.never_seen(things, 50)]
    scored = [scene for things in (1, 2) for scene, _ in evaluate.never_seen(things, 50, evaluate.OUTLINED)]
    assert all(scenes.held_out(scene) for scene in scored)
    keys = {scene.key() for scene in scored}
    assert len(keys) == 100
    assert not keys & {scene.key() for scene in drawn + old}


def test_what_is_hard_to_draw_weighs_more() -> None:
    """A star more than a square, something small more than something large, green on gray more than black on white."""

    def weight(shape: str, colour: str, r: float, behind: str) -> float:
        thing = Thing(shape, colour, x=0.25, y=0.75, r=r)
        seen = train_lora.weights(*scenes.pack([Scene((thing,), (behind,))]), 128)
        assert seen.shape == (1, 1, 128, 128)
        assert seen[0, 0, 32, 96] == seen.min() < seen[0, 0, 96, 32]
        return seen[0, 0, 96, 32].item()

    easy = weight("square", "black", 0.195, "white")
    assert weight("star", "black", 0.195, "white") > easy
    assert weight("square", "black", 0.1, "white") > easy
    assert weight("square", "green", 0.195, "gray") > easy


# ---------------------------------------------------------------- the file


def test_factors_added_by_hand_are_what_was_trained(tmp_path: Path) -> None:
    tiny, plain = tm.build(3), tm.build(3)
    adapted = train_lora.adapt(tiny.transformer, 3, 6.0)
    for layer in adapted.values():
        for factor in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(factor, std=0.1)
            factor.data = factor.data.bfloat16().float()  # as the file holds them
    train_lora.save(adapted, 6.0, tmp_path / "lora.safetensors")
    img, txt, vec = torch.randn(1, 16, 64), torch.randn(1, 5, 128), torch.randn(1, 128)
    with torch.no_grad():
        before = tm.velocity(plain, img, torch.ones(1), txt, vec)
        wanted = tm.velocity(tiny, img, torch.ones(1), txt, vec)
        tm.add_lora(plain.transformer, tmp_path / "lora.safetensors")
        found = tm.velocity(plain, img, torch.ones(1), txt, vec)
    assert (wanted - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_the_bundled_file_fits_the_miniature(tiny_dir: Path) -> None:
    config = json.loads((tiny_dir / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    weights = load_file(next((tiny_dir / "transformer").glob("*.safetensors")))
    shapes = {name: weight.shape for name, weight in weights.items()}
    tensors = load_file(train_lora.OUT)
    names = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    assert len(tensors) == 3 * len(names)
    assert len(names) == 12 * config["num_layers"] + 5 * config["num_single_layers"]
    for name in names:
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert down.dtype == up.dtype == torch.bfloat16
        assert (len(up), down.shape[1]) == shapes[name.removeprefix("transformer.") + ".weight"]
        assert len(down) == up.shape[1] < width
        assert down.isfinite().all()
        assert up.isfinite().all()
        assert up.any()
    assert train_lora.OUT.stat().st_size <= 400_000


# ---------------------------------------------------------------- pictures


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # diffusers' and transformers' own
def test_pictures_are_outlines_with_the_lora_only() -> None:
    """A sample of `evaluate.py --lora`; the whole scores are in docs/tiny-schnell.md."""
    cases = evaluate.never_seen(1, 4) + evaluate.never_seen(2, 4)
    prompts, seeds = [caption for _, caption in cases], list(range(len(cases)))
    plain = evaluate.diffusers_draw(evaluate.MODEL, True, "cpu")(prompts, seeds)
    lines = evaluate.diffusers_draw(evaluate.MODEL, True, "cpu", lora=train_lora.OUT)(prompts, seeds)
    assert not any(judge_outlines.outlines(seen).ok for seen in plain)
    assert sum(judge_outlines.outlines(seen).ok for seen in lines) >= 6


@pytest.mark.slow
def test_training_runs(tmp_path: Path) -> None:
    train_lora.main(tmp_path / "lora.safetensors", start=train_lora.OUT, smoke=True)
    before, after = load_file(train_lora.OUT), load_file(tmp_path / "lora.safetensors")
    assert before.keys() == after.keys()
    assert any((before[k] != after[k]).any() for k in before)
