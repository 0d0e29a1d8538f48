"""Encoding pictures: diffusers' latents, in strips of any height, and in memory whose size is known before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from diffusers import AutoencoderKL
from engine_parts import painter_of
from hypothesis import given
from hypothesis import strategies as st
from kernel_parts import ChannelsLast
from memory_parts import AMPLE, GB
from oracle import diffusers_vae
from safetensors.torch import load_file, save_file
from torch import Tensor

from vortex_core import Engine, MemoryPressureError, VortexCheckpointError, VortexInputError, load_flux_schnell
from vortex_core.checkpoint.key_maps import ENCODER, vae_sources
from vortex_core.cli.inspection import inspect
from vortex_core.flux1.decoder_memory import DecoderLayout
from vortex_core.flux1.encoder_memory import EncoderLayout
from vortex_core.flux1.spec import VaeSpec
from vortex_core.flux1.vae import library_bytes
from vortex_core.flux1.vae_encoder import Encoder, encode, encoder_library_bytes
from vortex_core.kernels import Kernels, choose_kernels, compiled, reference
from vortex_core.memory.planner import smallest_budget

SMALL = VaeSpec(channels=(24, 36, 36, 48), layers=2, groups=12)
FUSABLE = VaeSpec(channels=(16, 32, 32, 64), layers=1, groups=8)
POISON = 0xFF  # NaN in every type
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPT, SIZE = "a green ring", {"height": 64, "width": 96}


def pictures(*size: int) -> Tensor:
    return torch.rand((*size, 3), generator=torch.Generator().manual_seed(1))


def mode(theirs: AutoencoderKL, x: Tensor) -> Tensor:
    """diffusers' latents in the model's scale."""
    with torch.inference_mode():
        found = theirs.encode(x.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    return (found - theirs.config.shift_factor) * theirs.config.scaling_factor


def random_pair(spec: VaeSpec) -> tuple[Encoder, AutoencoderKL]:
    """An encoder, and diffusers' with the same weights."""
    torch.manual_seed(0)
    theirs = AutoencoderKL(
        block_out_channels=spec.channels,
        layers_per_block=spec.layers,
        latent_channels=spec.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=spec.groups,
        scaling_factor=spec.scale,
        shift_factor=spec.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    state = theirs.state_dict()
    with torch.no_grad():
        for tensor in state.values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape), alpha=0.1)
    ours = Encoder(spec).requires_grad_(False)
    ours.load_state_dict({name: state[vae_sources(ENCODER + name)[0]] for name in ours.state_dict()})
    ours.channels_last()
    return ours, theirs


def in_strips(encoder: Encoder, x: Tensor, rows: int | None, memory: Tensor | None = None) -> Tensor:
    batch, height, width, _ = x.shape
    out = torch.full((batch, 16, height // 8, width // 8), torch.nan, device=x.device)
    with torch.inference_mode():
        return encode(encoder, x, out, rows, memory)


def test_diffusers_loads_the_miniature_without_missing_keys(tiny_dir: Path) -> None:
    _, found = AutoencoderKL.from_pretrained(tiny_dir / "vae", output_loading_info=True)
    assert not any(found.values()), found


@pytest.mark.parametrize("size", [(64, 176), (128, 128), (72, 88)])
def test_the_miniature_agrees_with_diffusers(engine: Engine, tiny_dir: Path, size: tuple[int, int]) -> None:
    x = pictures(2, *size)
    found = engine.encode_image(x)
    assert (found.dtype, found.device, found.shape) == (
        torch.float32,
        engine.device,
        (2, 16, size[0] // 8, size[1] // 8),
    )
    torch.testing.assert_close(found, mode(diffusers_vae(tiny_dir), x), atol=2e-5, rtol=0)
    assert torch.equal(found, torch.cat([engine.encode_image(one[None]) for one in x]))


@pytest.mark.parametrize("size", [(72, 88), (80, 48), (8, 8)])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 30, 200, None])
def test_strips_are_the_whole(rows: int | None, size: tuple[int, int]) -> None:
    """In memory that is full of NaN, and then of what the encode before has left."""
    encoder, theirs = random_pair(SMALL)
    x, nbytes = pictures(2, *size), EncoderLayout(SMALL, size[0] // 8, size[1] // 8, rows, torch.float32).nbytes
    memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
    found = in_strips(encoder, x, rows, memory)
    torch.testing.assert_close(found, mode(theirs, x), atol=1e-5, rtol=0)  # nothing but the order of sums
    assert torch.equal(found, in_strips(encoder, x, rows, memory))
    assert torch.equal(found, in_strips(encoder, x, rows))


def test_strips_at_flux_widths_are_the_whole() -> None:
    encoder, theirs = random_pair(VaeSpec())
    x = pictures(1, 64, 96)
    whole = in_strips(encoder, x, None)
    torch.testing.assert_close(whole, mode(theirs, x), atol=2e-5, rtol=0)
    torch.testing.assert_close(whole, in_strips(encoder, x, 12), atol=2e-5, rtol=0)
    encoder.bfloat16()
    off = (in_strips(encoder, x, 12) - whole).abs()
    print(f"\nbf16 against fp32: mean {off.mean():.4f}, max {off.max():.4f}, of {whole.abs().mean():.3f}", end="")
    assert off.mean() < 0.02 * whole.abs().mean()


@pytest.mark.parametrize("rows", [6, 16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_sees_its_channels_last(rows: int | None, dtype: torch.dtype) -> None:
    encoder, x = random_pair(FUSABLE)[0].to(dtype), pictures(1, 56, 40)
    expected = in_strips(encoder, x, rows)
    encoder.use(ChannelsLast())
    assert torch.equal(expected, in_strips(encoder, x, rows))


@pytest.mark.slow
def test_the_fused_kernels_encode_the_same(fused: Kernels) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, x = random_pair(FUSABLE)[0].to(device), pictures(1, 16, 24).to(device)
    encoder.channels_last()
    expected = in_strips(encoder, x, None)
    encoder.use(fused)
    torch.testing.assert_close(in_strips(encoder, x, 8), expected, atol=1e-4, rtol=1e-4)


def test_too_little_memory_is_refused() -> None:
    nbytes = EncoderLayout(SMALL, 5, 4, 16, torch.float32).nbytes
    with pytest.raises(ValueError, match=f"takes {nbytes} bytes of memory; these are {nbytes - 1}"):
        in_strips(random_pair(SMALL)[0], pictures(1, 40, 32), 16, torch.empty(nbytes - 1, dtype=torch.uint8))


WIDTHS = st.lists(st.sampled_from([3, 4, 8, 16, 24]), min_size=4, max_size=4).map(tuple)


@given(st.integers(1, 40), st.integers(1, 40), WIDTHS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_nothing_is_written_over_that_is_still_read(
    height: int, width: int, channels: tuple[int, ...], dtype: torch.dtype
) -> None:
    layout, size = EncoderLayout(VaeSpec(channels=channels, groups=1), height, width, None, dtype), dtype.itemsize
    before = None
    for level, wide in zip(layout.levels, channels, strict=True):
        spans = [level.arrival, level.residual, level.other]
        for (begin, end), count in zip(spans, (level.arriving, wide, wide), strict=True):
            assert end - begin == level.height * level.width * count * size
            assert 0 <= begin < end <= layout.maps_bytes
        if level.arriving == wide:
            assert level.arrival == level.residual
            del spans[0]
        if before is not None:  # is read while the arrival is written
            assert apart(before, level.arrival)
        assert all(apart(a, b) for a in spans for b in spans if a is not b)
        before = level.residual
    lowest = layout.levels[-1]
    assert layout.attention >= max(lowest.residual[1], lowest.other[1])


def apart(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[1] <= other[0] or other[1] <= one[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [(64, 64), (512, 512), (1024, 1024), (2048, 2048), (64, 2048), (1536, 640)])
def test_an_encode_takes_no_more_than_a_decode(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """With the same strips; the encoder's weights come on top."""
    height, width = (side // 8 for side in size)
    for rows in (None, 256, 128, 64):
        ours, theirs = (
            layout(VaeSpec(), height, width, rows, dtype).nbytes for layout in (EncoderLayout, DecoderLayout)
        )
        assert ours <= theirs
    for kernels in (None, reference, compiled):
        ours = encoder_library_bytes(VaeSpec(), height, width, dtype, kernels)
        assert ours <= max(45e6, library_bytes(VaeSpec(), height, width, dtype, kernels))


# Files.


def decoder_only(tiny_dir: Path, folder: Path, **changes: Any) -> Path:
    """The miniature's VAE without an encoder, in a folder."""
    folder.mkdir()
    shutil.copy(tiny_dir / "vae" / "config.json", folder)
    tensors = load_file(tiny_dir / "vae" / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if not name.startswith(ENCODER)} | changes, folder / WEIGHTS)
    return folder


@pytest.fixture
def without(tiny_dir: Path, tmp_path: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", vae=decoder_only(tiny_dir, tmp_path / "vae")) as loaded:
        yield loaded


def test_a_model_without_an_encoder_draws_and_says_what_it_lacks(engine: Engine, without: Engine) -> None:
    assert torch.equal(without.generate(PROMPT, seed=1, **SIZE), engine.generate(PROMPT, seed=1, **SIZE))
    assert without.plan == engine.plan
    x = pictures(1, 64, 96)
    for use in (without.encode_image, lambda x: without.generate(PROMPT, image=x)):
        with pytest.raises(VortexCheckpointError, match=r"has no encoder\..*both halves.*ae\.safetensors, as `vae`"):
            use(x)


def test_an_encoder_with_a_hole_is_said_when_it_is_used(engine: Engine, tiny_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_dir / "vae" / WEIGHTS)
    name = "encoder.conv_in.weight"
    folder = decoder_only(tiny_dir, tmp_path / "vae", **{name: tensors[name]})
    with load_flux_schnell(tiny_dir, device="cpu", vae=folder) as other:
        with pytest.raises(VortexCheckpointError, match=r"encoder cannot be used: .* lacks \d+ tensors"):
            other.encode_image(pictures(1, 64, 96))
        assert torch.equal(other.generate(PROMPT, seed=1, **SIZE), engine.generate(PROMPT, seed=1, **SIZE))


def test_an_encoder_that_is_not_finite_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_dir / "vae" / WEIGHTS)
    broken = tensors["encoder.down_blocks.1.resnets.0.conv1.weight"]
    broken[0, 0, 0, 0] = torch.nan
    folder = decoder_only(tiny_dir, tmp_path / "vae", **{n: t for n, t in tensors.items() if n.startswith(ENCODER)})
    with pytest.raises(VortexCheckpointError, match=r"down_blocks\.1\.resnets\.0\.conv1\.weight holds NaN"):
        load_flux_schnell(tiny_dir, device="cpu", vae=folder)


def test_bfl_names_encode_the_same(engine: Engine, tiny_dir: Path, tmp_path: Path) -> None:
    """With attention as 1 x 1 convolutions, alone and in a file with everything."""
    x, folder = pictures(1, 64, 96), tmp_path / "vae"
    expected = engine.encode_image(x)
    folder.mkdir()
    shutil.copy(tiny_dir / "vae" / "config.json", folder)
    for prefix in ("", "vae.", "first_stage_model."):
        save_file({prefix + name: t for name, t in stand_in.vae(tiny_dir).items()}, folder / WEIGHTS)
        with load_flux_schnell(tiny_dir, device="cpu", vae=folder) as other:
            assert torch.equal(other.encode_image(x), expected)


def test_inspect_says_whether_there_is_an_encoder(tiny_dir: Path, tmp_path: Path) -> None:
    (whole,) = inspect(tiny_dir / "vae" / WEIGHTS).found
    (half,) = inspect(decoder_only(tiny_dir, tmp_path / "vae") / WEIGHTS).found
    assert whole.words == "diffusers names, bf16"
    assert half.words == "diffusers names, bf16, without an encoder"
    save_file(stand_in.vae(tiny_dir), tmp_path / "ae.safetensors")
    (bfl,) = inspect(tmp_path / "ae.safetensors").found
    assert bfl.words == "BFL names, bf16"


# Calls.


@pytest.mark.parametrize("wrong", [
    None, "a file", pictures(64, 96), pictures(1, 64, 90), pictures(1, 44, 64), pictures(1, 2048, 2056),
    pictures(1, 64, 64) * 255, pictures(1, 64, 64)[..., :2], pictures(1, 64, 64).int(),
    torch.full((1, 64, 64, 3), torch.nan), torch.empty(0, 64, 64, 3),
])  # fmt: skip
def test_what_is_no_picture_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    monkeypatch.setattr(painter_of(engine).memory, "run", lambda *a: pytest.fail("worked before refusing"))
    with pytest.raises(VortexInputError, match=r"pictures must|must be a multiple"):
        engine.encode_image(wrong)


def test_a_picture_may_have_any_type_and_strides(engine: Engine) -> None:
    x = pictures(2, 64, 96)
    expected = engine.encode_image(x)
    assert torch.equal(engine.encode_image(x.double()), expected)
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(engine.encode_image(planes), expected)
    assert torch.equal(engine.encode_image(x.half()), engine.encode_image(x.half().float()))


# Memory.


def test_text_to_picture_plans_as_before(roomy: Engine) -> None:
    drawn = roomy.generate(PROMPT, seed=1, **SIZE)
    before, x = roomy.plan, pictures(1, *SIZE.values())
    assert "encode" not in before.stages
    latents = roomy.encode_image(x)
    assert roomy.plan.stages["encode"] > painter_of(roomy).model.encoder_group.nbytes
    roomy.generate(PROMPT, seed=1, image=x)
    assert torch.equal(roomy.generate(PROMPT, seed=1, **SIZE), drawn)
    assert roomy.plan == before
    assert torch.equal(roomy.encode_image(x), latents)
    assert "encoder" not in {group.name for group in before.groups}


def test_a_tight_budget_encodes_the_same(roomy: Engine) -> None:
    model, x = painter_of(roomy).model, pictures(2, *SIZE.values())
    latents, drawn = roomy.encode_image(x), roomy.generate(PROMPT, seed=1, image=x[:1])
    text = model.requirements(*SIZE.values(), 1)
    for asked, work, expected in (
        (model.encode_requirements(*SIZE.values(), 2), lambda: roomy.encode_image(x), latents),
        (
            model.with_encode(replace(text, given=64 * 96 * 13)),
            lambda: roomy.generate(PROMPT, seed=1, image=x[:1]),
            drawn,
        ),
    ):
        roomy.limit(smallest_budget(model.sizes, asked) / GB)
        assert torch.equal(work(), expected)
        assert roomy.plan.peak <= roomy.budget
        held = sum(painter_of(roomy).memory.components.values()) + roomy.plan.requirements.pictures
        assert held <= roomy.plan.peak
        roomy.limit((smallest_budget(model.sizes, asked) - 2**22) / GB)
        with pytest.raises(MemoryPressureError, match="96 x 64"):
            work()
        roomy.limit(AMPLE)


def test_an_offloaded_engine_encodes_the_same(alone: Engine) -> None:
    x = pictures(1, 64, 96)
    latents = alone.encode_image(x)
    painter_of(alone).memory.offload()
    assert torch.equal(alone.encode_image(x), latents)


def test_memory_that_runs_out_in_an_encode_leaves_an_engine_that_encodes(
    roomy: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = pictures(1, 64, 96)
    latents = roomy.encode_image(x)
    encoder, times = painter_of(roomy).model.encoder, iter((True, False))
    forward = encoder.forward

    def full(*arguments: object) -> None:
        if next(times, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        forward(*arguments)

    monkeypatch.setattr(encoder, "forward", full)
    assert torch.equal(roomy.encode_image(x), latents)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernels", [None, reference, compiled])
def test_an_encode_allocates_no_more_than_it_says(
    rows: int | None, dtype: torch.dtype, kernels: Kernels | None
) -> None:
    device = torch.device("cuda")
    kernels = kernels or choose_kernels(device)
    encoder, theirs = random_pair(VaeSpec())
    encoder, x = encoder.to(device, dtype), pictures(1, 512, 384).to(device)
    encoder.channels_last()
    encoder.use(kernels)
    out = torch.empty(1, 16, 64, 48, device=device)
    memory = torch.empty(EncoderLayout(VaeSpec(), 64, 48, rows, dtype).nbytes, dtype=torch.uint8, device=device)
    limit = encoder_library_bytes(VaeSpec(), 64, 48, dtype, kernels)
    with torch.inference_mode():
        encode(encoder, x, out, rows, memory)  # libraries take their workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        encode(encoder, x, out, rows, memory)
        taken = torch.cuda.max_memory_allocated() - before
        expected = mode(theirs.to(device), x)
    off = float((out - expected).norm() / expected.norm())
    print(f"\n{taken / 1e6:.1f} of {limit / 1e6:.1f} MB; {off:.2e} from diffusers' fp32", end="")
    assert taken <= limit
    assert off < (0.03 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.gpu
def test_an_engine_on_a_gpu_agrees_with_diffusers(tiny_dir: Path) -> None:
    x = pictures(2, 64, 176)
    expected = mode(diffusers_vae(tiny_dir), x)
    with load_flux_schnell(tiny_dir, device="cuda") as engine:
        assert engine.encode_image(x).device == engine.device
        off = (engine.encode_image(x).cpu() - expected).abs()
        latents = engine.encode_image(x)
        assert torch.equal(engine.encode_image(x.cuda()), latents)
        engine.offload()
        assert torch.equal(engine.encode_image(x), latents)
    print(f"\nbf16 on the card against fp32: mean {off.mean():.4f}, max {off.max():.4f}", end="")
    assert off.mean() < 0.02
