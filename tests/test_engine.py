"""The engine's promises apart from the picture itself: buffers, cancelling, caching, releasing."""

from __future__ import annotations

import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from engine_parts import painter_of

from vortex_core import Engine, VortexInitializationError, VortexInputError, load_flux_schnell
from vortex_core.device import select
from vortex_core.flux1 import sampling, text_encoders
from vortex_core.flux1.conditioning import CACHED
from vortex_core.memory.offload import WeightGroup
from vortex_core.runtime import loading
from vortex_core.runtime import painter as painter_module
from vortex_core.runtime.model import Model
from vortex_core.runtime.painter import Painter

PROMPT = "a blue square"
SMALL = {"height": 64, "width": 64}


def test_host_memory_is_pageable_where_none_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, empty = [], torch.empty

    def refuse(shape: tuple[int, ...], *, dtype: torch.dtype, device: str, pin_memory: bool = False) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(select.torch, "empty", refuse)
    on_gpu = sampling.noise(7, 2, 64, 96, device=torch.device("cuda", 0))
    assert asked == [True, False]
    assert torch.equal(on_gpu, sampling.noise(7, 2, 64, 96))
    assert asked == [True, False, False]


def test_running_out_of_memory_while_loading_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, held = Model.read, []

    def full(model: Model, group: WeightGroup, *arguments: object) -> None:
        if group.name == "single_blocks.1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        read(model, group, *arguments)
        held.extend(weakref.ref(tensor) for module in group.modules for tensor in module.parameters())

    monkeypatch.setattr(Model, "read", full)
    with pytest.raises(
        VortexInitializationError, match=r"ran out of memory on cpu .*needed 0\.\d+ GB.*smallest vram"
    ) as e:
        load_flux_schnell("tiny", device="cpu", vram_budget=0.5)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)
    assert 0 < e.value.needed < 0.5e9
    assert (e.value.free, e.value.total, e.value.allocated) == (0, 0, 0)
    gc.collect()
    assert held
    assert not any(ref() is not None for ref in held)


def test_pictures_of_a_batch_are_the_singles(engine: Engine) -> None:
    assert torch.equal(sampling.noise(7, 3, 64, 64), torch.cat([sampling.noise(seed, 1, 64, 64) for seed in (7, 8, 9)]))
    batch = engine.generate(PROMPT, seed=7, batch_size=3, **SMALL)
    singles = torch.cat([engine.generate(PROMPT, seed=seed, **SMALL) for seed in (7, 8, 9)])
    assert (batch - singles).abs().max() < 1 / 255


@pytest.mark.parametrize(("height", "width"), [(128, 96), (64, 64), (1024, 1040)])
def test_noise_is_what_comfyui_draws(height: int, width: int) -> None:
    drawn = sampling.noise(123, 3, height, width)
    for i, picture in enumerate(drawn):
        torch.manual_seed(123 + i)
        assert torch.equal(picture[None], torch.randn(1, 16, height // 8, width // 8))


def test_a_drawn_seed_is_told_and_repeats_the_picture(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vortex_core.runtime.engine")
    picture = engine.generate(PROMPT, **SMALL)
    assert f"seed {engine.last_seed}" in caplog.text
    assert torch.equal(picture, engine.generate(PROMPT, seed=engine.last_seed, **SMALL))


def test_on_step_sees_every_step_and_the_final_latents(engine: Engine) -> None:
    seen = []
    picture = engine.generate(PROMPT, seed=1, on_step=lambda *step: seen.append(step), **SMALL)
    assert [(i, n) for i, n, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    latents = seen[-1][2]
    assert latents.shape == (1, 16, 8, 8)
    with torch.inference_mode():
        decoded = painter_module.decode(painter_of(engine).model.decoder, latents, torch.empty_like(picture))
    torch.testing.assert_close(decoded, picture, atol=1e-5, rtol=0)


def test_cancelling_leaves_the_engine_usable(engine: Engine) -> None:
    expected = engine.generate(PROMPT, seed=1, **SMALL)

    def cancel(i: int, n: int, latents: torch.Tensor) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, seed=1, on_step=cancel, **SMALL)
    assert torch.equal(engine.generate(PROMPT, seed=1, **SMALL), expected)


def test_a_repeated_prompt_is_not_encoded_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine.encode("a repeated prompt")
    monkeypatch.setattr(type(painter_of(engine).conditioner), "_made", lambda *a: pytest.fail("encoded again"))
    assert engine.encode("a repeated prompt") is first
    engine.generate("a repeated prompt", seed=1, **SMALL)


def test_the_cache_keeps_the_latest(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner = painter_of(engine).conditioner
    monkeypatch.setattr(conditioner, "_cache", type(conditioner._cache)())
    monkeypatch.setattr(type(conditioner), "_made", lambda self, txt, pooled, sigmas: object())
    monkeypatch.setattr(conditioner, "t5", lambda ids: None)
    monkeypatch.setattr(conditioner, "clip", lambda ids: None)
    oldest = conditioner("0", (1.0,), nullcontext)
    made = {n: conditioner(str(n), (1.0,), nullcontext) for n in range(1, CACHED + 1)}
    assert conditioner(str(CACHED), (1.0,), nullcontext) is made[CACHED]
    assert conditioner("0", (1.0,), nullcontext) is not oldest
    assert len(conditioner._cache) == CACHED


def test_a_conditioning_stands_for_its_prompt(engine: Engine) -> None:
    conditioning = engine.encode(PROMPT, steps=2)
    assert conditioning.sigmas == (1.0, 0.5)
    expected = engine.generate(PROMPT, seed=1, steps=2, **SMALL)
    assert torch.equal(engine.generate(conditioning, seed=1, steps=2, **SMALL), expected)
    in_four = engine.generate(PROMPT, seed=1, **SMALL)
    assert torch.equal(engine.generate(conditioning, seed=1, **SMALL), in_four)  # its text, for another schedule


def test_embeddings_from_elsewhere_draw_the_same(engine: Engine) -> None:
    clip, t5 = text_encoders.tokenize_prompt(*painter_of(engine).conditioner.tokenizers, PROMPT)
    with torch.inference_mode():
        txt, pooled = painter_of(engine).conditioner.t5(t5.ids), painter_of(engine).conditioner.clip(clip.ids)
    expected = engine.generate(PROMPT, seed=1, **SMALL)
    assert torch.equal(engine.generate(engine.condition(txt, pooled), seed=1, **SMALL), expected)
    longer = engine.condition(torch.cat((txt, txt), dim=1), pooled)
    assert engine.generate(longer, seed=1, **SMALL).isfinite().all()
    for bad_txt, bad_pooled, sentence in (
        (txt[0], pooled, "txt must be"),
        (txt[..., :64], pooled, "txt must be"),
        (txt, pooled[:, :64], "pooled must be"),
    ):
        with pytest.raises(VortexInputError, match=sentence):
            engine.condition(bad_txt, bad_pooled)


def test_native_size_is_the_default(engine: Engine) -> None:
    assert engine.generate(PROMPT, seed=1, steps=1).shape == (1, engine.native_size, engine.native_size, 3)


def test_threads_take_turns(engine: Engine) -> None:
    def draw(seed: int) -> torch.Tensor:
        return engine.generate(PROMPT, seed=seed, **SMALL)

    expected = list(map(draw, (1, 2)))
    with ThreadPoolExecutor() as pool:
        assert all(map(torch.equal, pool.map(draw, (1, 2)), expected))


def test_an_unloaded_engine_says_so(tiny_dir: Path) -> None:
    with load_flux_schnell(tiny_dir, device="cpu", backend="reference") as engine:
        engine.generate(PROMPT, seed=1, steps=1, **SMALL)
    with pytest.raises(VortexInputError, match="was unloaded"):
        engine.generate(PROMPT)
    with pytest.raises(VortexInputError, match="was unloaded"):
        engine.encode(PROMPT)
    engine.unload()  # twice is fine


def test_bf16_on_the_cpu_draws_nearly_the_same(engine: Engine, tiny_dir: Path) -> None:
    with load_flux_schnell(tiny_dir, device="cpu", dtype=torch.bfloat16) as half:
        picture = half.generate(PROMPT, seed=1, **SMALL)
        batch = half.generate(PROMPT, seed=1, batch_size=2, **SMALL)
    distance = (picture - engine.generate(PROMPT, seed=1, **SMALL)).abs().mean().item()
    in_batch = (picture - batch[:1]).abs().max().item()
    print(f"\nbf16 against fp32: mean {distance * 255:.2f}/255; batch against single: max {in_batch * 255:.2f}/255")
    assert distance < 8 / 255


def test_progress_counts_bytes_to_the_end(tiny_dir: Path) -> None:
    calls = []
    load_flux_schnell(tiny_dir, device="cpu", on_progress=lambda *call: calls.append(call)).unload()
    done, total = calls[-1]
    assert done == total
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)


def test_warming_up_draws_and_leaves_no_trace(engine: Engine) -> None:
    picture = engine.generate("a blue square", seed=3, height=64, width=64)
    engine.warmup(64, 64, batch_size=2)
    assert engine.last_seed == 3
    assert torch.equal(engine.generate("a blue square", seed=3, height=64, width=64), picture)
    with pytest.raises(VortexInputError, match="height"):
        engine.warmup(height=63)


def test_on_step_may_not_use_the_engine_that_calls_it(engine: Engine) -> None:
    conditioning = engine.encode(PROMPT)
    expected = engine.generate(PROMPT, seed=1, **SMALL)
    for call in (
        lambda latents: engine.decode(latents),
        lambda latents: engine.generate(PROMPT, seed=1, **SMALL),
        lambda latents: engine.condition(conditioning.txt, torch.zeros(1, painter_of(engine).model.flux.vec)),
        lambda latents: engine.offload(),
    ):
        with pytest.raises(VortexInputError, match="on_step may not use the engine"):
            engine.generate(PROMPT, seed=1, on_step=lambda i, n, latents, call=call: call(latents), **SMALL)
        assert torch.equal(engine.generate(PROMPT, seed=1, **SMALL), expected)


def test_a_load_that_is_interrupted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Painter] = []
    close = Painter.close
    monkeypatch.setattr(Painter, "close", lambda painter: (closed.append(painter), close(painter)))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_flux_schnell("tiny", device="cpu", on_progress=interrupt)
    assert [vars(painter) for painter in closed] == [{}]


def out_of_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_fast_is_exact_where_it_cannot_be_and_says_why(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (engine.mode, engine.precision) == ("exact", "exact")
    assert engine.precision_reason == "products in 8 bits gain nothing on cpu"
    caplog.set_level(logging.INFO, "vortex_core")
    with load_flux_schnell("tiny", device="cpu"):
        pass
    assert "Precision: exact (products in 8 bits gain nothing on cpu)" in caplog.text
    with monkeypatch.context() as context:
        context.setattr(loading, "choose_kernels", out_of_memory)
        with pytest.raises(VortexInitializationError, match="no room to try the kernels on cpu"):
            load_flux_schnell("tiny", device="cpu")
    with pytest.raises(VortexInputError, match="Unknown mode 'quick'; choose from fast, exact, int8, fp8"):
        load_flux_schnell("tiny", device="cpu", mode="quick")
