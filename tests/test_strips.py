"""Decoding in strips of any height draws what decoding whole draws, and takes less memory."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_leaves
from whole_vae import whole_decode

from vortex_core import Engine, load_flux_schnell
from vortex_core.footprint import META, footprint
from vortex_core.kernels import reference, shapes
from vortex_core.spec import VaeSpec
from vortex_core.vae import Decoder, decode


def random_decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(VaeSpec()).requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return decoder


def in_strips(decoder: Decoder, latents: torch.Tensor, rows: int | None) -> torch.Tensor:
    batch, _, height, width = latents.shape
    return decode(decoder, latents, torch.full((batch, height * 8, width * 8, 3), torch.nan), rows)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, None])
def test_strips_of_the_miniature_are_the_whole(engine: Engine, rows: int | None) -> None:
    latents = noise(2, 16, 10, 6)
    with torch.inference_mode():
        distance = (whole_decode(engine._decoder, latents) - in_strips(engine._decoder, latents, rows)).abs().max()
    assert distance < 1e-4  # nothing but the order of sums


def test_strips_at_flux_widths_are_the_whole() -> None:
    decoder, latents = random_decoder(), noise(1, 16, 8, 12)
    with torch.inference_mode():
        whole = whole_decode(decoder, latents)
        assert (whole - in_strips(decoder, latents, 12)).abs().max() < 1e-4
        decoder.bfloat16()
        distance = (in_strips(decoder, latents, None) - in_strips(decoder, latents, 12)).abs() * 255
        rounding = (in_strips(decoder, latents, 12) - whole).abs() * 255
    print(f"\nbf16, /255: strips against whole mean {distance.mean():.3f}, max {distance.max():.3f}; ", end="")
    print(f"bf16 against fp32 mean {rounding.mean():.3f}, max {rounding.max():.3f}", end="")
    assert distance.mean() < 1
    assert distance.max() < 4
    assert rounding.mean() < 1


class ChannelsLast:
    """Kernels, for maps as the fused ones take them: these read memory, whatever the strides say."""

    def __init__(self, kernels: object = reference) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., object]:
        def checked(*arguments: object, **options: object) -> object:
            found = getattr(self._kernels, name)(*arguments, **options)
            for tensor in tree_leaves((arguments, options, found)):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                    assert tensor.is_contiguous(memory_format=torch.channels_last), name
            return found

        return checked


@pytest.mark.parametrize("rows", [3, 8, 12, None])
def test_every_kernel_sees_its_channels_last(rows: int | None) -> None:
    decoder, latents = random_decoder(), noise(1, 16, 8, 12)
    with torch.inference_mode():
        expected = in_strips(decoder, latents, rows)
        decoder.channels_last()
        decoder.use(ChannelsLast())
        assert (expected - in_strips(decoder, latents, rows)).abs().max() < 1e-4


@pytest.mark.parametrize("rows", [3, None])
def test_planned_maps_have_their_channels_last(rows: int | None) -> None:
    """Or what a call takes would be planned with copies in it that the card never makes."""
    with META, torch.inference_mode():
        decoder = Decoder(VaeSpec())
        decoder.channels_last()
        decoder.use(ChannelsLast(shapes))
        decode(decoder, torch.empty(1, 16, 8, 12), torch.empty(1, 64, 96, 3), rows)


@pytest.mark.gpu
def test_an_engine_on_a_gpu_decodes_with_the_fused_kernels() -> None:
    latents = noise(2, 16, 16, 16)
    with load_flux_schnell("tiny", device="cuda") as engine, torch.inference_mode():
        assert engine._decoder.norm_out.kernels is not reference
        whole = whole_decode(engine._decoder, latents.to(engine.device, engine.dtype))
        off = (engine.decode(latents) - whole.float()).abs() * 255
    print(f"\nfused kernels against torch's: mean {off.mean():.3f}, max {off.max():.3f} of 255", end="")
    assert off.mean() < 1
    assert off.max() < 4


def test_independent_tiles_would_not_pass(engine: Engine) -> None:
    latents = noise(1, 16, 16, 8)
    with torch.inference_mode():
        whole = whole_decode(engine._decoder, latents)
        tiles = torch.cat([whole_decode(engine._decoder, tile) for tile in latents.chunk(2, dim=2)], dim=1)
    assert (whole - tiles).abs().mean() * 255 > 1


@pytest.mark.parametrize("side", [512, 1024])
def test_strips_take_less_memory(side: int) -> None:
    with META:
        decoder = Decoder(VaeSpec()).bfloat16()
        latents, out = torch.empty(1, 16, side // 8, side // 8), torch.empty(1, side, side, 3)
    whole = footprint(lambda: whole_decode(decoder, latents))
    tall, low = (footprint(lambda rows=rows: decode(decoder, latents, out, rows)) for rows in (64, 32))
    print(f"\n{side}: whole {whole / 1e9:.3f} GB, strips {tall / 1e9:.3f} to {low / 1e9:.3f} GB", end="")
    assert low < tall < whole / 2.5
