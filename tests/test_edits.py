"""Drawing from a picture and inside a mask: what stays, what is drawn anew, and what is refused."""

from __future__ import annotations

from typing import Any

import edits
import pytest
import torch
from torch import Tensor

from vortex_core import Engine, VortexInputError

PROMPT, SIDES = "a green ring", (64, 96)


def picture(batch: int = 1) -> Tensor:
    """Smooth, so that it survives the VAE."""
    rows, columns = (torch.linspace(0, 1, side) for side in SIDES)
    one = torch.stack(torch.broadcast_tensors(rows[:, None], columns[None], torch.tensor(0.3)), dim=-1)
    return torch.stack([one.roll(i, dims=-1) for i in range(batch)])


def mask() -> Tensor:
    """The right third."""
    found = torch.zeros(SIDES)
    found[:, 64:] = 1
    return found


def test_a_small_strength_stays_near_the_picture(engine: Engine) -> None:
    (case,) = edits.recoloured(1)
    x = case.picture[None]
    found = [engine.generate(PROMPT, seed=1, image=x, strength=strength) for strength in (0.05, 0.6, 1.0)]
    off = [float((seen - x).abs().mean()) for seen in found]
    assert off == sorted(off)
    assert off[0] < 0.02
    assert case.keeps_place(found[0][0])


def test_a_full_strength_draws_from_noise_alone(engine: Engine) -> None:
    size = dict(zip(("height", "width"), SIDES, strict=True))
    expected = engine.generate(PROMPT, seed=1, **size)
    assert torch.equal(engine.generate(PROMPT, seed=1, image=picture(), strength=1), expected)
    assert not torch.equal(engine.generate(PROMPT, seed=1, image=picture()), expected)


def test_outside_of_the_mask_the_picture_stays_bit_for_bit(engine: Engine) -> None:
    x, where = picture(2), mask()
    found = engine.generate(PROMPT, seed=1, image=x, mask=where, batch_size=2)
    kept = where == 0
    assert torch.equal(found[:, kept], x[:, kept])
    assert (found - x)[:, ~kept].abs().mean() > 0.05
    assert torch.equal(engine.generate(PROMPT, seed=1, image=x, mask=0 * where, batch_size=2), x)


def test_a_soft_mask_blends(engine: Engine) -> None:
    x, where = picture(), mask()
    where[:, 56:64] = torch.linspace(0, 1, 8)
    found = engine.generate(PROMPT, seed=1, image=x, mask=where)
    assert torch.equal(found[:, :, :57], x[:, :, :57])
    assert not torch.equal(found[:, :, 58:64], x[:, :, 58:64])


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_single_pictures(engine: Engine, masked: bool) -> None:
    x, where = picture(2), mask() if masked else None
    found = engine.generate(PROMPT, seed=5, image=x, mask=where, batch_size=2)
    single = [engine.generate(PROMPT, seed=5 + i, image=x[i : i + 1], mask=where) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(single), atol=2e-3, rtol=0)
    one = engine.generate(PROMPT, seed=5, image=x[:1], mask=where, batch_size=2)
    torch.testing.assert_close(one[:1], single[0], atol=2e-3, rtol=0)


def test_it_repeats_and_tells_its_steps(engine: Engine) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    x = picture()
    found = engine.generate(PROMPT, seed=1, image=x, on_step=lambda i, n, clean: seen.append((i, n, clean.shape)))
    assert seen == [(i, 3, (1, 16, 8, 12)) for i in (1, 2, 3)]  # 0.6 of 4 steps, rounded up
    assert torch.equal(engine.generate(PROMPT, seed=1, image=x), found)
    out = torch.empty_like(found)
    assert engine.generate(PROMPT, seed=1, image=x, out=out) is out
    assert torch.equal(out, found)


def test_a_picture_to_begin_from_may_be_guided(engine: Engine) -> None:
    x = picture()
    found = engine.generate(PROMPT, "a red star", seed=1, image=x, mask=mask(), guidance=2)
    assert torch.equal(found[:, :, :64], x[:, :, :64])
    assert not torch.equal(found, engine.generate(PROMPT, seed=1, image=x, mask=mask()))


@pytest.mark.parametrize(("options", "sentence"), [
    ({"strength": 0.5}, "strength needs an image"),
    ({"mask": mask()}, "mask needs an image"),
    ({"image": picture(2)}, "image holds 2 pictures for 1"),
    ({"image": picture(), "height": 128}, "height is 128, but the image's is 64"),
    ({"image": picture(), "mask": mask()[:32]}, r"mask must be \[B, 64, 96\]"),
    ({"image": picture(), "mask": 2 * mask()}, "mask must have values from 0 to 1; found 0 to 2"),
    ({"image": picture() * 255}, "image must have values from 0 to 1"),
    ({"image": picture(), "strength": 0}, "strength must be a number above 0"),
    ({"image": picture(), "strength": 0.5, "sigmas": (0.5, 0)}, "Give sigmas or strength, not both"),
    ({"image": picture()[:, :60]}, "height must be a multiple of 16"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(engine: Engine, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(VortexInputError, match=sentence):
        engine.generate(PROMPT, seed=1, **options)


# What the judge says. The miniature alone: what it learned is what it is judged by.


def test_what_was_encoded_is_decoded(engine: Engine) -> None:
    share, mean, lowest = edits.reconstructed(engine, 100)
    print(f"\n{share:.0%} right, PSNR {mean:.1f} dB, at least {lowest:.1f}", end="")
    assert share >= 0.95
    assert mean > 45


@pytest.mark.slow
def test_another_colour_comes_in_the_same_place(engine: Engine) -> None:
    cases = list(edits.recoloured(100))
    found = edits.drawn(engine, cases, masked=False)
    share = edits.right(cases, found, in_place=True)
    print(f"\n{share:.0%} have the new colour in the same place", end="")
    assert share >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("things", [1, 2])
def test_what_is_asked_for_is_drawn_inside_the_mask(engine: Engine, things: int) -> None:
    cases = list(edits.redrawn(100, things))
    found = edits.drawn(engine, cases, masked=True)
    for case, seen in zip(cases, found, strict=True):
        assert torch.equal(seen[case.mask == 0], case.picture[case.mask == 0])
    share = edits.right(cases, found)
    print(f"\n{share:.0%} show what was asked for", end="")
    assert share >= 0.85
