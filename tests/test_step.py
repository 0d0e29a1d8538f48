"""One step as a fixed sequence over given buffers: sizes, batches, and how far 8 bits may be from `exact`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from engine_parts import painter_of
from step_parts import request, rope, size_of
from torch import Tensor

from vortex_core import Engine, load_flux_schnell
from vortex_core.flux1 import sampling
from vortex_core.flux1.schedule import timesteps
from vortex_core.flux1.step_buffers import StepBuffers
from vortex_core.flux1.transformer import Transformer
from vortex_core.kernels import reference
from vortex_core.memory.arena import Region
from vortex_core.quant.precision import EXACT, Fp8, Int8, Precision
from vortex_core.runtime.graphs import BoundStep, step_bytes

PRECISIONS = [EXACT, Fp8(), Fp8(fp8_attention=True), Int8()]
SIZES = [(64, 64, 1), (128, 80, 2), (64, 96, 3)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@torch.inference_mode()
def test_steps_of_several_sizes_share_memory_and_stay_right(
    engine: Engine, transformer: Transformer, precision: Precision
) -> None:
    transformer.use(reference, precision)
    largest = max(step_bytes(painter_of(engine).model.flux, size_of(*size), torch.float32, precision) for size in SIZES)
    memory = torch.empty(largest, dtype=torch.uint8)
    steps = {size: BoundStep(transformer, size_of(*size), Region(memory)) for size in SIZES}
    for size in [*SIZES, *SIZES]:
        arguments = request(engine, *size)
        memory.fill_(0xFF)  # NaN in every type
        assert torch.equal(steps[size](*arguments), transformer(*arguments))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@torch.inference_mode()
def test_a_step_takes_the_bytes_that_were_planned(
    engine: Engine, transformer: Transformer, precision: Precision
) -> None:
    transformer.use(reference, precision)
    for height, width, batch in SIZES:
        size = size_of(height, width, batch)
        memory = torch.empty(
            step_bytes(painter_of(engine).model.flux, size, torch.float32, precision), dtype=torch.uint8
        )
        BoundStep(transformer, size, Region(memory))(*request(engine, height, width, batch))
        with pytest.raises(ValueError, match="A plan is too small"):
            BoundStep(transformer, size, Region(memory[:-256]))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("width", [80, 144])  # 40 and 72 tokens
@torch.inference_mode()
def test_pictures_of_a_batch_equal_singles(
    engine: Engine, transformer: Transformer, precision: Precision, width: int
) -> None:
    transformer.use(reference, precision)
    img, txt, modulation, pe = request(engine, 128, width, 3)
    together = transformer(img, txt, modulation, pe)
    for i in range(3):
        alone = transformer(img[i : i + 1], txt[i : i + 1], modulation, pe)
        bound = 0.05 * float(alone.abs().max()) if precision.scaled else 1e-4  # of rounding to 8 bits
        torch.testing.assert_close(together[i : i + 1], alone, atol=bound, rtol=1e-4)


def test_the_library_takes_every_pictures_scales_aligned(engine: Engine) -> None:
    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        flat = torch.empty(shape, dtype=dtype)
        starts[name] = flat.data_ptr()
        return flat

    starts: dict[str, int] = {}
    step = StepBuffers(painter_of(engine).model.flux, reference, (3, 250, 25), torch.bfloat16, take, Fp8())
    ends = {"normal": [], "active": []}
    for stream in (step.txt, step.img, step.joint):
        for name, operand in (("normal", stream.normal), ("active", stream.active)):
            for scale in operand.scale:
                assert (scale.data_ptr() - starts[f"{name}_scale"]) % 64 == 0
                ends[name].append((scale.data_ptr(), len(scale)))
    for spans in ends.values():  # of text and image, which are in use at once
        for (start, length), (following, _) in pairwise(sorted(spans[:6])):
            assert start + 4 * length <= following


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fast", "int8"])
def test_odd_pictures_of_a_batch_equal_singles_in_8_bits(mode: str) -> None:
    with load_flux_schnell("tiny", device="cuda", mode=mode) as engine:
        size = {"height": 80, "width": 80}
        together = engine.generate("a blue square", seed=1, batch_size=2, **size)
        for i in range(2):
            alone = engine.generate("a blue square", seed=1 + i, **size)
            assert (together[i] - alone[0]).abs().mean() < 0.02


def denoised(engine: Engine, seed: int, prompt: str) -> Tensor:
    conditioning, img = engine.encode(prompt), sampling.pack(sampling.noise(seed, 1, 128, 128))
    transformer, pe = painter_of(engine).model.transformer, rope(engine, 128, 128)
    txt = transformer.txt_in(conditioning.txt)
    return sampling.denoise(
        lambda x, first, sigma: transformer(x, txt, conditioning.rows(sigma), pe), img, timesteps(4)
    )


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("precision", "share"), [(Fp8(), 0.5), (Fp8(fp8_attention=True), 0.5), (Int8(), 0.25)])
def test_8_bits_are_nearer_to_exact_than_nf4_is_to_16_bits(
    engine: Engine, transformer: Transformer, precision: Precision, share: float
) -> None:
    """Final latents within a share of NF4's own distance to the unquantized model."""
    plain = load_flux_schnell("tiny", device="cpu", quantization="none")
    from_8_bits, from_nf4 = 0.0, 0.0
    for seed, prompt in enumerate(("a blue square", "a small green star above a large yellow ring", "two red circles")):
        transformer.use(reference)
        exact = denoised(engine, seed, prompt)
        from_nf4 += float((exact - denoised(plain, seed, prompt)).norm())
        transformer.use(reference, precision)
        from_8_bits += float((denoised(engine, seed, prompt) - exact).norm())
    assert 0 < from_8_bits <= share * from_nf4


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@torch.inference_mode()
def test_a_fused_step_in_16_bits_is_as_near_to_32_as_the_reference_is(quantization: str) -> None:
    velocities = []
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
        with load_flux_schnell("tiny", device=device, dtype=dtype, quantization=quantization, mode="exact") as engine:
            assert painter_of(engine).model.transformer.on_card == (device == "cuda")
            *tensors, pe = request(engine, 128, 80, 2)
            placed = (tensor.to(device, dtype) for tensor in tensors)
            velocity = painter_of(engine).model.transformer(*placed, tuple(table.to(device) for table in pe))
            velocities.append(velocity.float().cpu())
    exact, expected, ours = velocities
    assert 0 < (ours - exact).norm() < 1.25 * (expected - exact).norm()


@pytest.mark.gpu
def test_kernels_that_are_launched_early_draw_what_those_in_turn_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from vortex_core.kernels import launch
    from vortex_core.kernels.card import card

    if not card(torch.device("cuda", 0)).early:
        pytest.skip("this card launches no kernel early")
    with load_flux_schnell("tiny", device="cuda", mode="fast") as engine:

        def drawn() -> list[Tensor]:
            painter_of(engine).memory.graphs.clear()
            return [engine.generate("a ring", seed=seed, height=256, width=192, batch_size=2) for seed in range(4)]

        early = drawn()
        monkeypatch.setattr(launch, "card", lambda device: card(device)._replace(early=False))
        assert all(map(torch.equal, drawn(), early))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "fast", "int8"])
def test_pictures_of_another_size_compile_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="NOT RUN: Triton is not installed here")
    compiled: list[str] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, src, **others: compiled.append(src.name))
    with load_flux_schnell("tiny", device="cuda", mode=mode) as engine:
        for side in (64, 128):  # a convolution takes a smaller tile of a small picture
            engine.generate("a blue square", seed=1, height=side, width=side)
        compiled.clear()
        for height, width in ((112, 144), (80, 176), (64, 112)):  # tokens and pixels that are no multiple of 16
            engine.generate("a blue square", seed=1, height=height, width=width)
    assert not compiled


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_waits_for_nothing_while_it_draws() -> None:
    with load_flux_schnell("tiny", device="cuda") as engine:
        expected = [engine.generate("a blue square", seed=1) for _ in range(2)][1]
        conditioning = engine.encode("a blue square")
        sent = [conditioning.txt, conditioning.modulation, sampling.noise(1, 1, 128, 128, device=engine.device)]
        sent += sampling.rope_of(128, 128, 256, painter_of(engine).model.flux, engine.device)
        assert all(tensor.is_pinned() for tensor in sent)
        torch.cuda.set_sync_debug_mode("error")
        try:
            picture = engine.generate("a blue square", seed=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(picture, expected)
