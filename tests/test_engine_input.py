"""What an engine refuses, in words and before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_parts import painter_of

from vortex_core import Conditioning, Engine, VortexDeviceError, VortexError, VortexInputError, load_flux_schnell
from vortex_core.runtime import loading
from vortex_core.runtime import painter as painter_module

PROMPT = "a blue square"
SMALL = {"height": 64, "width": 64}


@pytest.fixture
def untouched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, failing the test if any work is done."""

    def work(*arguments: object) -> None:
        pytest.fail("worked before checking")

    monkeypatch.setattr(painter_module.sampling, "noise", work)
    monkeypatch.setattr(type(painter_of(engine).conditioner), "__call__", work)
    return engine


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": None}, "prompt must be a text, not None"),
        ({"prompt": "a red circle \ud83d"}, r"half a character \(U\+D83D\) at place 13"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"height": 100}, "height must be a multiple of 16"),
        ({"width": 48}, "width must be a multiple of 16 from 64"),
        ({"width": 4096}, "to 2048 pixels, not 4096"),
        ({"height": 64.0}, "height must be"),
        ({"steps": 0}, "steps must be from 1 to 8"),
        ({"steps": 9}, "steps must be from 1 to 8"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"seed": "7"}, "seed must be a whole number"),
        ({"out": torch.empty(1, 64, 3, 64).mT}, "out must be contiguous"),
        ({"out": torch.empty(1, 64, 64, 4)}, r"out must be \(1, 64, 64, 3\).*found \(1, 64, 64, 4\)"),
        ({"out": torch.empty(1, 64, 64, 3, dtype=torch.float16)}, "found .* torch.float16"),
        ({"out": torch.empty(1, 64, 64, 3, device="meta")}, "on meta"),
        ({"out": np.zeros((1, 64, 64, 3))}, "out must be a tensor"),
        ({"out": torch.zeros(1).expand(1, 64, 64, 3)}, "out must be contiguous"),
        ({"out": torch.zeros(1, 64, 64, 3).to_sparse()}, "out must be contiguous"),
        ({"out": torch.zeros(1, 64, 64, 3, requires_grad=True)}, r"pass out\.detach"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": np.True_}, "seed must be a whole number"),
        ({"seed": torch.tensor(True)}, "seed must be a whole number"),
        ({"seed": np.float32(3)}, "seed must be a whole number"),
        ({"seed": torch.tensor(3, device="meta")}, "seed must be a whole number"),
        ({"seed": 10**5000}, "seed must be a whole number"),
        ({"steps": True}, "steps must be from 1 to 8"),
        ({"width": True}, "width must be"),
        ({"batch_size": 10**12}, "batch_size must be a whole number from 1 to 1024, not 1000000000000"),
        ({"deadline": np.array([1.0, 2.0])}, "deadline is a number"),
        ({"on_step": 5}, "on_step must be a function, not 5"),
        ({"negative_prompt": np.array(["a", "b"])}, "The prompt must be a text"),
    ],
)
def test_bad_input_is_refused_before_any_work(untouched: Engine, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(VortexInputError, match=sentence) as refusal:
        untouched.generate(**{"prompt": PROMPT, **SMALL, **arguments})
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, VortexError)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(engine: Engine, number: Callable[[int], object]) -> None:
    expected = engine.generate(PROMPT, seed=3, steps=1, **SMALL)
    given = {name: number(value) for name, value in {"seed": 3, "steps": 1, "batch_size": 1, **SMALL}.items()}
    with torch.inference_mode():
        out = torch.empty_like(expected)
    assert torch.equal(engine.generate(PROMPT, out=out, deadline=np.float32(60), **given), expected)
    assert type(engine.last_seed) is int
    assert engine.encode(PROMPT, number(1)) is engine.encode(PROMPT, 1)
    engine.warmup(number(64), number(64))


@pytest.mark.parametrize(
    "budget", [True, np.True_, "6.5", math.nan, math.inf, 1e300, 10**400, None, [1], "x" * 10**6, 0, -1]
)
def test_a_budget_is_a_finite_number_above_0(engine: Engine, budget: object) -> None:
    with pytest.raises(VortexInputError, match="vram_budget") as refusal:
        engine.limit(budget)
    assert len(str(refusal.value)) < 400
    if budget is not None:
        with pytest.raises(VortexInputError, match="vram_budget"):
            load_flux_schnell("nowhere", device="cpu", vram_budget=budget)
    assert loading.check_budget(np.float32(2), None) == loading.check_budget(torch.tensor(2), None) == 2 * 10**9


def test_what_is_no_conditioning_of_this_engine_is_refused(untouched: Engine, engine: Engine) -> None:
    spec, nan = painter_of(engine).model.flux, float("nan")
    txt, pooled = torch.zeros(1, 4, spec.context), torch.zeros(1, spec.vec)
    table, levels = torch.zeros(2, spec.modulation_rows, spec.hidden), (1.0, 0.5)
    for given, sentence in (
        ((txt.numpy(), pooled, levels, table), "txt must be .* a tensor, not"),
        ((txt[0], pooled, levels, table), "txt must be"),
        ((txt, pooled[0], levels, table), "pooled must be"),
        ((txt, pooled, levels, table.long()), "modulation must be .* not torch.int64"),
        ((txt, pooled, levels, table[:1]), "modulation must be"),
        ((txt, pooled, (1.0, 1.5), table), "sigmas must be a sequence of numbers from 0 to 1"),
        ((txt, pooled, (), table[:0]), "sigmas must be"),
        ((txt.to("meta"), pooled, levels, table), "on meta"),
        ((txt, pooled, levels, table * nan), "modulation of the Conditioning is not finite"),
        ((txt[..., :64], pooled, levels, table), "of another model"),
        ((txt, pooled[:, 1:], levels, table), "of another model"),
        ((txt, pooled, levels, table[:, 1:]), "of another model"),
        ((txt.bfloat16(), pooled, levels, table), "of another dtype"),
    ):
        with pytest.raises(VortexError, match=sentence) as refusal:
            untouched.generate(Conditioning(*given), seed=1, steps=2, **SMALL)
        assert len(str(refusal.value)) < 500


def test_what_is_no_latents_or_embeddings_is_refused(engine: Engine) -> None:
    latents, txt, pooled = torch.zeros(1, 16, 8, 8), torch.zeros(1, 4, 128), torch.zeros(1, 128)
    for bad in (latents.numpy(), latents.tolist(), latents[0], latents.long(), latents + math.inf, latents.to("meta")):
        with pytest.raises(VortexInputError, match="latents"):
            engine.decode(bad)
    for bad in (txt.numpy(), txt.tolist(), txt.bool(), txt[:, :0], txt + math.nan, txt.to("meta"), txt.to_sparse()):
        with pytest.raises(VortexInputError, match="txt"):
            engine.condition(bad, pooled)
    with pytest.raises(VortexInputError, match="pooled holds NaN or infinity"):
        engine.condition(txt, pooled - math.inf)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "bf16"}, "dtype is one of torch.bfloat16, torch.float16, torch.float32, not 'bf16'"),
        ({"dtype": torch.int8}, "not torch.int8"),
        ({"mode": np.array(["exact", "fast"])}, "Unknown mode"),
        ({"quantization": ["nf4"]}, "Unknown quantization"),
        ({"backend": 5}, "Unknown backend 5"),
        ({"backend": "x" * 10**6}, "Unknown backend"),
        ({"device": []}, "is not a device"),
        ({"on_progress": 5}, "on_progress must be a function"),
        ({"cache_dir": 5}, "A path is expected, not 5"),
    ],
)
def test_options_of_a_foreign_kind_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(VortexError, match=sentence) as refusal:
        load_flux_schnell("nowhere", **{"device": "cpu", **options})
    assert len(str(refusal.value)) < 400


def test_bad_load_arguments_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(VortexInputError, match="Unknown quantization 'int3'; choose from nf4, none"):
        load_flux_schnell("tiny", quantization="int3")
    with pytest.raises(VortexDeviceError, match="not on an Apple GPU"):
        load_flux_schnell("tiny", device="mps")
    with pytest.raises(VortexDeviceError, match="is not a device"):
        load_flux_schnell("tiny", device="gpu")
    with pytest.raises(VortexDeviceError, match="There is no cuda:99"):
        load_flux_schnell("tiny", device="cuda:99")


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "RTX 2080")
    with pytest.raises(VortexDeviceError, match=r"RTX 2080 has compute capability 7.5; .* 8.0 or higher"):
        load_flux_schnell("tiny", device="cuda")


def test_no_latents_are_refused(engine: Engine) -> None:
    with pytest.raises(VortexInputError, match="at least one, not"):
        engine.decode(torch.empty(0, 16, 8, 8))
