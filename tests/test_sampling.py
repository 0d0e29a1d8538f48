"""From noise to clean latents, by hand: each function against its plainest form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vortex_core.flux1 import sampling
from vortex_core.flux1.schedule import timesteps
from vortex_core.flux1.spec import FluxSpec
from vortex_core.utils.timing import Stopwatch

SPEC = FluxSpec(hidden=128, heads=1, double_blocks=1, single_blocks=1)
HEIGHT, WIDTH = 48, 80  # 3 x 5 tokens


def test_each_picture_has_the_noise_of_its_own_seed() -> None:
    made = sampling.noise(7, 3, HEIGHT, WIDTH)
    assert made.shape == (3, 16, 6, 10)
    assert made.dtype == torch.float32
    for i in range(3):
        generator = torch.Generator().manual_seed(7 + i)
        assert torch.equal(made[i], torch.randn(16, 6, 10, generator=generator))
    assert sampling.noise(0, 1, 64, 64, channels=4).shape == (1, 4, 8, 8)


def test_tokens_are_squares_of_two_by_two() -> None:
    latents = torch.arange(2 * 16 * 6 * 10, dtype=torch.float32).view(2, 16, 6, 10)
    tokens = sampling.pack(latents)
    assert sampling.image_tokens(HEIGHT, WIDTH) == 15
    assert tokens.shape == (2, 15, 64)
    for row in range(3):
        for column in range(5):
            square = latents[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[1, 5 * row + column], square.reshape(-1))
    back = sampling.unpack(tokens, HEIGHT, WIDTH)
    assert torch.equal(back, latents)
    assert back.untyped_storage().data_ptr() != tokens.untyped_storage().data_ptr()


def test_patches_are_views_of_both_sides() -> None:
    latents, img = torch.zeros(2, 16, 6, 10), torch.zeros(2, 15, 64)
    sampling.patches(latents).copy_(torch.randn(2, 3, 5, 16, 2, 2))
    sampling.as_patches(img, HEIGHT, WIDTH).copy_(sampling.patches(latents))
    assert latents.std() > 0.5
    assert torch.equal(img, sampling.pack(latents))


def test_the_schedule_is_even_from_1_to_0() -> None:
    assert timesteps(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert timesteps(1) == (1.0, 0.0)


def test_text_stands_at_the_origin_and_tokens_at_their_row_and_column() -> None:
    ids = sampling.positions(HEIGHT, WIDTH, 4)
    assert ids[:4].tolist() == [[0.0, 0.0, 0.0]] * 4
    assert ids[4:].tolist() == [[0.0, float(row), float(column)] for row in range(3) for column in range(5)]


def test_angles_are_positions_times_frequencies() -> None:
    ids = sampling.positions(HEIGHT, WIDTH, 2)
    cos, sin = sampling.rope(ids, SPEC, torch.device("cpu"))
    assert cos.shape == sin.shape == (2 + 15, 64)
    assert cos.dtype == sin.dtype == torch.float32
    for token in (0, 2, 9, 16):
        frequencies = [(axis, 10_000 ** (-k / dim)) for axis, dim in enumerate((16, 56, 56)) for k in range(0, dim, 2)]
        angles = [float(ids[token, axis]) * frequency for axis, frequency in frequencies]
        assert torch.equal(cos[token], torch.tensor([math.cos(a) for a in angles], dtype=torch.float64).float())
        assert torch.allclose(sin[token], torch.tensor([math.sin(a) for a in angles]), atol=1e-6)
    assert sampling.rope(ids, SPEC, torch.device("meta"))[0].device.type == "meta"
    assert sampling.rope(ids, SPEC, torch.device("meta"))[1].device.type == "meta"
    kept = sampling.rope_of(HEIGHT, WIDTH, 2, SPEC)
    assert torch.equal(kept[0], cos)
    assert torch.equal(kept[1], sin)
    assert sampling.rope_of(HEIGHT, WIDTH, 2, SPEC) is kept


class Velocity:
    """Stands for the denoiser: a velocity that depends on all it is given, which it remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, int, float]] = []

    def __call__(self, img: Tensor, first: int, sigma: float) -> Tensor:
        self.calls.append((img.clone(), first, sigma))
        return (img * sigma + first).bfloat16()


@pytest.mark.parametrize("parts", [None, [2, 1], [1, 1, 1]])
@pytest.mark.parametrize("watched", [False, True])
def test_steps_follow_the_velocity(parts: list[int] | None, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    monkeypatch.setattr(sampling, "check", lambda: checks.append(len(velocity.calls)))
    start, sigmas = torch.randn(3, 15, 64), (0.75, 0.25, 0.0)
    velocity, told = Velocity(), []
    clean = torch.full((3, 15, 64), float("nan"))

    def on_step(i: int, n: int, predicted: Tensor) -> None:
        assert predicted.data_ptr() == clean.data_ptr()
        told.append((i, n, predicted.clone()))

    img = start.clone()
    with Stopwatch(torch.device("cpu")) as watch:
        done = sampling.denoise(velocity, img, sigmas, on_step if watched else None, parts, clean)
    assert done is img
    sizes = parts or [3]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    of_row = torch.tensor([first for first, size in zip(firsts, sizes, strict=True) for _ in range(size)])[
        :, None, None
    ]
    expected, predicted = start.clone(), []
    for t, step in ((0.75, -0.5), (0.25, -0.25)):
        v = (expected * t + of_row).bfloat16().float()
        predicted.append(expected - t * v)
        expected = expected + step * v
    torch.testing.assert_close(img, expected)
    assert checks == [0, len(sizes)]
    assert [(len(x), first, sigma) for x, first, sigma in velocity.calls] == [
        (size, first, sigma) for sigma in (0.75, 0.25) for size, first in zip(sizes, firsts, strict=True)
    ]
    assert [(i, n) for i, n, _ in told] == ([(1, 2), (2, 2)] if watched else [])
    for (_, _, found), wanted in zip(told, predicted, strict=False):
        torch.testing.assert_close(found, wanted)
    assert bool(clean.isnan().all()) is not watched
    assert list(watch.phases) == ["step 1", "step 2"]


def test_what_is_predicted_has_memory_of_its_own_where_none_is_given() -> None:
    seen: list[Tensor] = []
    img = torch.randn(1, 15, 64)
    sampling.denoise(Velocity(), img, (1.0, 0.5, 0.0), lambda i, n, clean: seen.append(clean))
    assert seen[0] is seen[1]
    assert seen[0].data_ptr() != img.data_ptr()


def test_what_is_kept_follows_the_noise_of_the_level() -> None:
    clean, noise, start = torch.randn(3, 1, 15, 64).unbind()
    mask = torch.zeros(1, 15, 64)
    mask[:, 5:] = 1
    seen: list[Tensor] = []
    img = start.clone()
    kept = sampling.Kept(clean, noise, mask)
    sampling.denoise(Velocity(), img, (1.0, 0.5, 0.0), lambda i, n, x: seen.append(x.clone()), None, None, kept)
    free = sampling.denoise(Velocity(), start.clone(), (1.0, 0.5, 0.0))
    assert torch.equal(img[:, :5], clean[:, :5])
    assert torch.equal(img[:, 5:], free[:, 5:])
    assert all(torch.equal(x[:, :5], clean[:, :5]) for x in seen)
    kept.restore(img, 0.25)
    torch.testing.assert_close(img[:, :5], 0.75 * clean[:, :5] + 0.25 * noise[:, :5])


def test_a_strength_takes_its_share_of_the_steps() -> None:
    assert timesteps(4, 0.5) == (0.5, 0.25, 0.0)
    assert timesteps(4, 0.6) == pytest.approx((0.6, 0.4, 0.2, 0.0))
    assert timesteps(4, 0.75) == (0.75, 0.5, 0.25, 0.0)
    assert timesteps(4, 0.01) == (0.01, 0.0)
    assert timesteps(3, 1 / 3) == pytest.approx((1 / 3, 0.0))
