"""Faults at every stage of a picture, memory that runs out, and values that are not finite."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_parts import painter_of
from lifecycle_parts import SMALL, STAGES, Fault, draw
from torch import Tensor

from vortex_core import Engine, MemoryPressureError, NotFiniteError, load_flux_schnell
from vortex_core.cli.png import encode
from vortex_core.device import finite_pictures
from vortex_core.memory.planner import smallest_budget


@pytest.fixture(scope="module")
def own(tiny_dir: Path) -> Iterator[Engine]:
    """One that may be planned anew."""
    with load_flux_schnell(tiny_dir, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def streaming(tiny_dir: Path) -> Iterator[Engine]:
    """One whose blocks do not fit its budget."""
    with load_flux_schnell(tiny_dir, device="cpu", vram_budget=0.5) as loaded:
        draw(loaded)
        loaded.limit((smallest_budget(painter_of(loaded).model.sizes, loaded.plan.requirements) + 1000) / 1e9)
        draw(loaded)
        assert loaded.plan.streamed
        yield loaded


# Faults


def held() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors = [tensor for tensor in tensors if not tensor.is_meta and tensor.layout is torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_after_a_fault_the_next_picture_is_right_and_memory_is_back(
    own: Engine, streaming: Engine, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = streaming if "streamed" in stage else own
    prompt = f"a prompt for {stage}"  # which is encoded now
    expected = draw(engine)
    for kind in (RuntimeError, MemoryError):
        before = held()
        with monkeypatch.context() as patch:
            fault = Fault(patch, stage, kind)
            if kind is MemoryError and engine is own:  # tried again
                assert engine.generate(prompt, seed=1, **SMALL).isfinite().all()
            else:
                with pytest.raises(MemoryPressureError if kind is MemoryError else kind):
                    engine.generate(prompt, seed=1, **SMALL)
            assert fault.calls
        assert torch.equal(draw(engine), expected)
        while len(painter_of(engine).conditioner._cache) > 1:
            painter_of(engine).conditioner._cache.popitem(last=False)
        if kind is not MemoryError:  # blocks that have streamed stay in host memory, too
            assert held() <= before


@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory"]
)
def test_memory_that_runs_out_twice_is_our_error_in_whatever_words(
    own: Engine, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(own)
    with monkeypatch.context() as patch:
        Fault(patch, "decode", lambda: RuntimeError(words), times=2)
        with pytest.raises(MemoryPressureError, match="Memory ran out, twice"):
            draw(own)
    assert torch.equal(draw(own), expected)


# Pictures that are not finite


def test_a_picture_that_is_not_finite_is_an_error(alone: Engine) -> None:
    expected = draw(alone)
    bias = painter_of(alone).model.decoder.conv_out.bias
    good = bias.clone()
    with torch.inference_mode():
        bias[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"picture of seed 1 is not finite .*Damaged weights"):
        draw(alone)
    with pytest.raises(NotFiniteError, match="picture of these latents is not finite"):
        alone.decode(torch.zeros(1, 16, 8, 8))
    with torch.inference_mode():
        bias.copy_(good)
    assert torch.equal(draw(alone), expected)
    with pytest.raises(NotFiniteError, match="The picture is not finite"):
        encode(expected[0] * float("nan"), {})


def test_weights_that_are_not_finite_are_found_where_a_prompt_is_encoded(alone: Engine) -> None:
    with torch.inference_mode():
        painter_of(alone).model.modulation.get_parameter("final_layer.adaLN_modulation.1.bias")[0] = float("nan")
    with pytest.raises(NotFiniteError, match="modulation of the Conditioning is not finite"):
        alone.encode("a prompt that nobody has asked for")


def test_on_a_gpu_the_log_tells_when_the_picture_is_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[bool] = []

    class Event:
        def query(self) -> bool:
            return bool(done)

    class Stream:
        def record_event(self) -> Event:
            return Event()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(finite_pictures, "host_buffer", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    verdicts = finite_pictures.Verdicts(torch.device("cuda", 0))
    verdicts.check(torch.full((2, 2), float("nan")), "The first")
    verdicts.check(torch.ones(2, 2), "The second")
    verdicts.tell()
    assert not caplog.records
    done.append(True)
    verdicts.tell()
    verdicts.tell()
    assert [(record.levelno, record.message[:23]) for record in caplog.records] == [
        (logging.ERROR, "The first is not finite")
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_values_are_finite(dtype: torch.dtype) -> None:
    values = torch.full((4096,), 60_000.0, dtype=dtype)
    finite_pictures.check_finite(values, "It")
    values[7] = float("inf")
    with pytest.raises(NotFiniteError, match="It is not finite"):
        finite_pictures.check_finite(values, "It")
