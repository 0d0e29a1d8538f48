"""Numerics against diffusers, transformers and bitsandbytes: same weights in, same numbers out."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from engine_parts import painter_of
from oracle import diffusers_pipeline, diffusers_transformer, diffusers_vae

from vortex_core import Engine, load_flux_schnell
from vortex_core.flux1 import sampling
from vortex_core.flux1.sampling import rope_of
from vortex_core.flux1.schedule import timesteps
from vortex_core.flux1.vae import decode

PROMPT = "a small green star above a large yellow ring"


@pytest.fixture(scope="module")
def pipeline(engine: Engine, tiny_dir: Path) -> FluxPipeline:
    return diffusers_pipeline(engine, tiny_dir)


@pytest.mark.parametrize("size", [(64, 64), (128, 80)])
@torch.inference_mode()
def test_transformer_agrees_with_diffusers(engine: Engine, tiny_dir: Path, size: tuple[int, int]) -> None:
    height, width = size
    theirs = diffusers_transformer(engine, tiny_dir)
    spec = painter_of(engine).model.flux
    draw = torch.Generator().manual_seed(3)
    img = torch.randn(2, height // 16 * width // 16, 64, generator=draw)
    txt = torch.randn(1, 256, spec.context, generator=draw)
    pooled = torch.randn(1, spec.vec, generator=draw)
    conditioning = painter_of(engine).conditioner.from_embeddings(txt, pooled, timesteps(4)[:-1])
    ids = sampling.positions(height, width, 256)
    for i, t in enumerate((1.0, 0.75, 0.5, 0.25)):
        expected = theirs(
            hidden_states=img,
            encoder_hidden_states=txt.expand(2, -1, -1),
            pooled_projections=pooled.expand(2, -1),
            timestep=torch.tensor([t, t]),
            txt_ids=ids[:256],
            img_ids=ids[256:],
        ).sample
        ours = painter_of(engine).model.transformer(
            img,
            painter_of(engine).model.transformer.txt_in(txt).expand(2, -1, -1),
            conditioning.modulation[i],
            rope_of(height, width, 256, spec),
        )
        assert (ours - expected).abs().max() / expected.std() < 1e-4


@torch.inference_mode()
def test_text_encoders_agree_with_transformers(engine: Engine, pipeline: FluxPipeline) -> None:
    txt, pooled, _ = pipeline.encode_prompt(PROMPT, None, max_sequence_length=256)
    conditioning = painter_of(engine).conditioner.from_embeddings(txt, pooled, timesteps(4)[:-1])
    ours = engine.encode(PROMPT)
    torch.testing.assert_close(ours.txt, txt, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.modulation, conditioning.modulation, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_pipeline_agrees_with_diffusers(engine: Engine, pipeline: FluxPipeline, size: tuple[int, int]) -> None:
    height, width = size
    noise = sampling.noise(11, 1, height, width)
    expected = pipeline(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=256,
        latents=sampling.pack(noise),
        output_type="pt",
    ).images
    ours = engine.generate(PROMPT, seed=11, height=height, width=width)
    assert (ours - expected.permute(0, 2, 3, 1)).abs().max() < 2 / 255


@torch.inference_mode()
def test_vae_agrees_with_diffusers(engine: Engine, tiny_dir: Path) -> None:
    theirs = diffusers_vae(tiny_dir)
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    expected = theirs.decode(latents / theirs.config.scaling_factor + theirs.config.shift_factor).sample
    ours = decode(painter_of(engine).model.decoder, latents, torch.full((2, 64, 96, 3), torch.nan))
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_packing_and_schedule_are_diffusers_own(tiny_dir: Path) -> None:
    latents = torch.randn(2, 16, 6, 10)
    packed = sampling.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(sampling.unpack(packed, 48, 80), latents)
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_dir / "scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert torch.allclose(scheduler.sigmas, torch.tensor(timesteps(4)))


def test_from_pipeline_draws_the_same_as_from_its_folder(engine: Engine, tiny_dir: Path) -> None:
    pipe = FluxPipeline.from_pretrained(tiny_dir, dtype=torch.bfloat16)
    theirs = Engine.from_pipeline(pipe, device="cpu")
    kwargs = {"seed": 2, "height": 64, "width": 64}
    assert torch.equal(theirs.generate(PROMPT, **kwargs), engine.generate(PROMPT, **kwargs))


def test_unquantized_weights_agree_with_the_plain_pipeline(tiny_dir: Path) -> None:
    plain = load_flux_schnell(tiny_dir, device="cpu", quantization="none")
    pipe = FluxPipeline.from_pretrained(tiny_dir, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=256,
        latents=sampling.pack(sampling.noise(4, 1, 64, 64)),
        output_type="pt",
    ).images
    ours = plain.generate(PROMPT, seed=4, height=64, width=64)
    assert (ours - expected.permute(0, 2, 3, 1)).abs().max() < 2 / 255
