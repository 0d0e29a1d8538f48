"""What a call may ask beyond a prompt: noise levels, several prompts, and what to keep away from."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_parts import painter_of
from torch import Tensor

from vortex_core import Engine
from vortex_core.errors import NoEffectWarning, VortexInputError
from vortex_core.flux1 import sampling
from vortex_core.flux1.nag import Nag
from vortex_core.flux1.schedule import timesteps

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import judge
import scenes

RED, BLUE = "a red circle on a white background", "a small blue star"
SIZE = {"height": 64, "width": 96}


def start(seed: int, height: int = 64, width: int = 96, batch: int = 1) -> Tensor:
    return sampling.noise(seed, batch, height, width)


# ------------------------------------------------------------ the denoiser's call


def test_a_sampler_of_ones_own_draws_what_generate_draws(engine: Engine) -> None:
    latents, conditioning = start(5), engine.encode(RED)
    for sigma, following in zip(timesteps(4), timesteps(4)[1:], strict=False):
        latents = latents + (following - sigma) * engine.velocity(latents, sigma, conditioning).cpu()
    expected: list[Tensor] = []
    engine.generate(RED, seed=5, **SIZE, on_step=lambda i, n, clean: expected.append(clean.cpu()))
    torch.testing.assert_close(latents, expected[-1], atol=2e-5, rtol=1e-5)


def test_a_schedule_is_the_callers(engine: Engine) -> None:
    even = engine.generate(RED, seed=1, **SIZE)
    assert torch.equal(engine.generate(RED, seed=1, **SIZE, sigmas=timesteps(4)), even)
    other = engine.generate(RED, seed=1, **SIZE, sigmas=(1, 0.9, 0.3, 0))
    assert not torch.equal(other, even)
    known = engine.encode(RED, sigmas=(1, 0.9, 0.3))
    assert known.sigmas == pytest.approx((1, 0.9, 0.3))
    assert torch.equal(engine.generate(known, seed=1, **SIZE, sigmas=(1, 0.9, 0.3, 0)), other)
    # a conditioning of another schedule gets the table that it lacks
    assert torch.equal(engine.generate(engine.encode(RED), seed=1, **SIZE, sigmas=(1, 0.9, 0.3, 0)), other)


def test_a_level_off_the_grid_is_computed_alone(engine: Engine) -> None:
    conditioning = engine.encode(RED)
    latents = start(2)
    found = engine.velocity(latents, 0.61, conditioning)
    planned = engine.velocity(latents, 0.61, engine.schedule(conditioning, (1, 0.61)))
    torch.testing.assert_close(found, planned, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, engine.velocity(latents, 0.5, conditioning), atol=1e-3)


def test_a_schedule_longer_than_a_plan_has_room_for(engine: Engine) -> None:
    levels = tuple(i / 20 for i in range(20, 0, -1))
    known = engine.schedule(engine.encode(RED), levels)
    assert len(known.modulation) == 20
    alone = engine.schedule(engine.encode(RED), (levels[13],))
    torch.testing.assert_close(known.rows(levels[13]), alone.modulation[0], atol=1e-5, rtol=1e-4)


def test_time_is_embedded_in_fp32(tiny_dir: Path) -> None:
    """0.75 is 750 thousandths of noise, not 752, as it is where bf16 multiplies."""
    engine = Engine.load(tiny_dir, device="cpu", dtype=torch.bfloat16)
    known = engine.encode(RED, sigmas=(0.75, 0.752))
    assert not torch.equal(known.modulation[0], known.modulation[1])
    engine.unload()


def test_each_picture_has_its_own_prompt(engine: Engine) -> None:
    both = engine.generate([RED, BLUE], seed=3, **SIZE)
    assert both.shape == (2, 64, 96, 3)
    for i, prompt in enumerate((RED, BLUE)):
        torch.testing.assert_close(both[i : i + 1], engine.generate(prompt, seed=3 + i, **SIZE), atol=1e-5, rtol=0)


# ------------------------------------------------------------ guidance


def test_guidance_leads_away_by_its_factor(engine: Engine) -> None:
    sigmas = (1.0, 0.0)
    found: list[Tensor] = []
    engine.generate(
        RED, BLUE, seed=9, **SIZE, sigmas=sigmas, guidance=3, on_step=lambda i, n, clean: found.append(clean.cpu())
    )
    latents = start(9)
    wanted, avoided = (engine.velocity(latents, 1.0, engine.encode(text, 1)).cpu() for text in (RED, BLUE))
    expected = latents - (avoided + 3 * (wanted - avoided))
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_texts_of_other_lengths_are_guided_and_avoided(engine: Engine) -> None:
    spec = engine.spec.flux
    draw = torch.Generator().manual_seed(0)
    texts = [
        engine.condition(torch.randn(1, n, spec.context, generator=draw), torch.randn(1, spec.vec, generator=draw))
        for n in (300, 40)
    ]
    for how in ({"guidance": 2.0}, {"nag": 5.0}):
        for wanted, avoided in (texts, texts[::-1]):
            picture = engine.generate(wanted, avoided, seed=1, **SIZE, **how)
            assert picture.isfinite().all()
            assert not torch.equal(picture, engine.generate(wanted, seed=1, **SIZE))


def test_what_has_no_effect_is_told(engine: Engine) -> None:
    with pytest.warns(NoEffectWarning, match="nag at 5"):
        engine.generate(RED, BLUE, seed=1, **SIZE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": 0.5}, "guidance must be 0"),
        ({"guidance": float("nan")}, "guidance must be 0"),
        ({"nag": -1}, "nag must be 0"),
        ({"nag": "strong"}, "nag must be 0"),
        ({"nag": 51}, "nag must be 0"),
        ({"nag": 5, "guidance": 2}, "not both"),
        ({"sigmas": (1, 0.5)}, "fall from at most 1 to 0"),
        ({"sigmas": (0.5, 0.5, 0)}, "fall from at most 1 to 0"),
        ({"sigmas": ()}, "sigmas must be a sequence"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": [RED, BLUE], "batch_size": 3}, "2 prompts for 3 pictures"),
        ({"strength": 0.5}, "needs an image"),
    ],
)
def test_wrong_wishes_are_refused(engine: Engine, options: dict[str, object], words: str) -> None:
    with pytest.raises(VortexInputError, match=words):
        engine.generate(**{"prompt": RED, **options}, **SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("terms", [{"scale": 0.5}, {"tau": 0}, {"alpha": 2}, {"alpha": float("inf")}])
def test_nag_has_ranges(terms: dict[str, float]) -> None:
    with pytest.raises(VortexInputError, match="of NAG must be"):
        Nag(**terms)


def test_a_velocity_is_led_away_from_a_text_alone(engine: Engine) -> None:
    for wrong in ({"nag": 5}, {"negative": engine.encode(BLUE)}):
        with pytest.raises(VortexInputError, match="nag needs a negative"):
            engine.velocity(start(0), 1.0, engine.encode(RED), **wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------ NAG


def by_hand(engine: Engine, latents: Tensor, wanted: str, avoided: str, nag: Nag) -> Tensor:
    """The velocity with NAG as the paper has it: two whole passes, whose attention meets after each block's.

    Both passes have the modulation of what is wanted, so the image is the same in both.
    """
    transformer = painter_of(engine).model.transformer
    height, width = 8 * latents.shape[2], 8 * latents.shape[3]
    known, other = engine.encode(wanted), engine.encode(avoided)
    pe = sampling.rope_of(height, width, 256, engine.spec.flux)
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = original(q, k, v)  # [2, H, L, C]: what is wanted, what is avoided
        found, against = out[:, :, 256:].transpose(1, 2).flatten(2).unbind(0)
        led = nag.scale * found - (nag.scale - 1) * against
        ratio = led.abs().sum(-1, keepdim=True) / found.abs().sum(-1, keepdim=True)
        led = led * torch.minimum(ratio, torch.tensor(nag.tau)) / ratio
        image = nag.alpha * led + (1 - nag.alpha) * found
        out[:, :, 256:] = image.view(-1, out.shape[1], out.shape[3]).transpose(0, 1)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        img = sampling.pack(latents).expand(2, -1, -1)
        txt = transformer.txt_in(torch.cat((known.txt, other.txt)))
        found = transformer(img, txt, known.modulation[0], pe)
    return sampling.unpack(found[:1], height, width)


@pytest.mark.parametrize("nag", [Nag(), Nag(9, 1.1, 1), Nag(1, 1, 0.3)])
@torch.inference_mode()
def test_nag_is_that_of_the_paper(engine: Engine, nag: Nag) -> None:
    latents = start(4)
    expected = by_hand(engine, latents, RED, BLUE, nag)
    found = engine.velocity(latents, 1.0, engine.encode(RED), negative=engine.encode(BLUE), nag=nag)
    assert (found - expected).abs().max() / expected.std() < 1e-4


@torch.inference_mode()
def test_nag_of_a_batch_is_that_of_its_pictures(engine: Engine) -> None:
    batch = engine.generate(RED, BLUE, seed=2, batch_size=3, nag=4, **SIZE)
    for i, picture in enumerate(batch):
        alone = engine.generate(RED, BLUE, seed=2 + i, nag=4, **SIZE)
        torch.testing.assert_close(picture[None], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_nag_in_eight_bits(tiny_dir: Path, mode: str) -> None:
    engine = Engine.load(tiny_dir, device="cpu", mode=mode, dtype=torch.bfloat16)
    exact = Engine.load(tiny_dir, device="cpu", mode="exact", dtype=torch.bfloat16)
    latents = start(4)
    found, expected = (
        each.velocity(latents, 1.0, each.encode(RED), negative=each.encode(BLUE), nag=5) for each in (engine, exact)
    )
    plain = exact.velocity(latents, 1.0, exact.encode(RED))
    assert (found - expected).norm() < 0.5 * (expected - plain).norm()
    for each in (engine, exact):
        each.unload()


@pytest.mark.slow
def test_a_colour_that_is_to_be_avoided_is_hardly_drawn(engine: Engine) -> None:
    """Captions that name no colour: the miniature then draws gray things."""

    def gray(**options: object) -> int:
        found: Counter[str | None] = Counter()
        for shape in scenes.SHAPES:
            where = f"{shape} on a white background"
            avoided = f"a gray {where}" if options else None
            pictures = engine.generate(f"a {where}", avoided, seed=0, batch_size=12, **options)  # type: ignore[arg-type]
            found.update(thing.colour for picture in pictures for thing in judge.judge(picture).things)
        return found["gray"]

    plain, led = gray(), gray(nag=5.0)
    print(f"gray things of {12 * len(scenes.SHAPES)} pictures: {plain}, with NAG {led}")
    assert plain > 60
    assert led <= plain / 10
