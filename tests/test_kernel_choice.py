"""Which kernels a card gets: Triton's, those in CUDA C, or torch's own with comfy-kitchen's, and what the log says."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import cuda_on_cpu
import pytest
import torch
import torch.nn.functional as F
from kernel_parts import assert_same, draw, empty, part
from torch import Tensor

from vortex_core import kernels
from vortex_core.kernels import ScaledTensor, choose_kernels, compiled, kitchen, library, nvrtc, reference
from vortex_core.utils import packages

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Which packages are broken is found out again, and there is a card of compute capability 8.6."""
    caplog.set_level(logging.INFO, "vortex_core")
    monkeypatch.setattr(packages, "_broken", {})
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))


@pytest.fixture
def declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused_declined", lambda device: "no Triton")
    monkeypatch.setattr(kernels, "compiled_declined", lambda device: "no NVRTC")


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()).to(x.dtype)


def rms_rope_(q: Tensor, k: Tensor, freqs: Tensor, q_scale: Tensor, k_scale: Tensor, eps: float) -> None:
    """`[B, T, H, C]` in place, with turns `[1, T, 1, C / 2, 2, 2]`."""
    for x, scale in ((q, q_scale), (k, k_scale)):
        pairs = F.rms_norm(x.float(), x.shape[-1:], scale.float(), eps).unflatten(-1, (-1, 1, 2))
        x.copy_((freqs * pairs).sum(-1).flatten(-2))


@pytest.fixture
def fake_kitchen(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A comfy-kitchen in plain torch."""

    @contextmanager
    def use_backend(name: str) -> Iterator[None]:
        fake.asked.append(name)
        yield

    fake = ModuleType("comfy_kitchen")
    fake.asked, fake.use_backend, fake.adaln, fake.rms_rope_ = [], use_backend, adaln, rms_rope_
    monkeypatch.setitem(sys.modules, "comfy_kitchen", fake)
    return fake


@pytest.mark.parametrize("functions", [reference, library, compiled])
def test_every_module_has_every_function(functions: ModuleType) -> None:
    names = [name for name, value in vars(kernels.Kernels).items() if callable(value) and name[0] != "_"]
    assert len(names) > 15
    assert all(callable(getattr(functions, name, None)) for name in names)
    if functions is not reference:  # whose public names are more
        assert sorted(names) == functions.__all__


def test_the_cpu_has_plain_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_kernels(CPU) is reference
    assert "fused ones declined on cpu: they need CUDA, not cpu" in caplog.text


def test_without_triton_there_is_cuda_c(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(kernels, "_compiled_broken", lambda device: None)
    assert choose_kernels(CARD) is compiled
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "CUDA C, compiled by NVRTC; Triton's declined on cuda:0: Triton does not import" in caplog.text


def test_a_card_that_is_too_old_gets_neither(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(kitchen, "taken", lambda device: ({}, "no kitchen"))
    assert choose_kernels(CARD).modulate is library.modulate
    assert caplog.text.count("they need compute capability 8.0") == 2
    assert "no kitchen" in caplog.text


@pytest.mark.skipif(
    cuda_on_cpu.COMPILER is None, reason="NOT RUN, the kernels in CUDA C: there is no C++ compiler here"
)
def test_samples_catch_kernels_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "launch", cuda_on_cpu.launch)
    broken = kernels._compiled_broken.__wrapped__
    assert broken(CPU) is None
    for name in ("dequantize", "residual_modulate", "rotate", "norm_silu"):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, name, lambda *arguments: None)
            assert broken(CPU) == "a sample differs from the reference"


def test_nvrtc_that_is_missing_or_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    nvrtc.load.cache_clear()
    with pytest.raises(OSError, match="this torch build is not for CUDA"):
        nvrtc.compiled("", "sm_86")
    monkeypatch.setattr(torch.version, "cuda", "99.1")  # whose library is nowhere
    with pytest.raises(OSError, match=r"nvrtc.*99"):
        nvrtc.compiled("", "sm_86")

    def fails(*arguments: object) -> None:
        raise nvrtc.CompileError("NVRTC, compiling for sm_86: no such architecture\nmore")

    monkeypatch.setattr(compiled, "launch", fails)
    told = kernels._compiled_broken.__wrapped__(CPU)
    assert told == "NVRTC does not run (NVRTC, compiling for sm_86: no such architecture)"

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(compiled, "launch", full)
    with pytest.raises(torch.OutOfMemoryError):
        kernels._compiled_broken.__wrapped__(CPU)


# comfy-kitchen.


def test_what_agrees_is_taken_from_comfy_kitchen(
    fake_kitchen: ModuleType, declined: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions, words = kitchen.taken(CPU)
    assert set(functions) == {"modulate", "residual_modulate", "rotate"}
    assert words.endswith("adaLN taken, RMS norm with rotary embedding taken")
    assert set(fake_kitchen.asked) == {"cuda"}  # never its Triton backend
    monkeypatch.setattr(kitchen, "taken", lambda device: (functions, words))
    chosen = choose_kernels(CARD)
    assert (chosen.rotate, chosen.convolve) == (kitchen.rotate, library.convolve)
    assert caplog.records[-1].levelname == "WARNING"
    assert "no Triton" in caplog.text
    assert "no NVRTC" in caplog.text
    assert "rotary embedding taken" in caplog.text


def test_a_comfy_kitchen_that_is_missing_or_broken_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    functions, words = kitchen.taken(CPU)
    assert not functions
    assert words.startswith("comfy-kitchen does not import")
    monkeypatch.delitem(sys.modules, "comfy_kitchen")
    monkeypatch.setattr(packages, "_broken", {})
    (tmp_path / "comfy_kitchen.py").write_text("raise OSError('no libcudart')")
    monkeypatch.syspath_prepend(tmp_path)
    assert kitchen.taken(CPU) == ({}, "comfy-kitchen does not import (no libcudart)")


def test_each_function_of_comfy_kitchen_is_declined_for_itself(fake_kitchen: ModuleType) -> None:
    right = fake_kitchen.adaln
    fake_kitchen.adaln = lambda x, scale, shift, eps: right(x, shift, scale, eps)  # the other order of arguments
    functions, words = kitchen.taken(CPU)
    assert set(functions) == {"rotate"}
    assert "adaLN declined (off by" in words
    fake_kitchen.adaln = lambda x, scale, shift, eps: right(x, scale, shift, eps) * torch.nan
    assert "adaLN declined (off by nan on a sample)" in kitchen.taken(CPU)[1]
    fake_kitchen.adaln = right
    del fake_kitchen.rms_rope_  # an old one
    functions, words = kitchen.taken(CPU)
    assert set(functions) == {"modulate", "residual_modulate"}
    assert "rotary embedding declined (module 'comfy_kitchen' has no attribute 'rms_rope_')" in words


def test_a_comfy_kitchen_without_its_cuda_backend_is_declined(fake_kitchen: ModuleType) -> None:
    def refuses(name: str) -> None:
        raise RuntimeError(f"Backend '{name}' is not available: CUDA not available on this system")

    fake_kitchen.use_backend = refuses
    functions, words = kitchen.taken(CPU)
    assert not functions
    assert "declined (Backend 'cuda' is not available: CUDA not available on this system)" in words


def test_no_room_for_a_sample_is_no_verdict(fake_kitchen: ModuleType) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    fake_kitchen.adaln = full
    with pytest.raises(torch.OutOfMemoryError):
        kitchen.taken(CPU)


# torch's own functions, and comfy-kitchen's in their place.


@pytest.fixture(params=[library, kitchen], ids=["torch", "kitchen"])
def ours(request: pytest.FixtureRequest, fake_kitchen: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(library, "TOKENS", 7)  # several parts
    return request.param


def near(found: Tensor, expected: Tensor) -> None:
    """Equal up to three roundings of bf16: that of the result, and of `1 + scale` or of a norm before it."""
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected.float(), rtol=3 * 2**-8, atol=0.02)
    assert (found.float() - expected.float()).norm() < 0.004 * expected.float().norm()


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("width", [64, 192, 3072])
@pytest.mark.parametrize("residual", [False, True])
def test_modulate(ours: ModuleType, width: int, residual: bool) -> None:
    x, again = part(2, 5, width, torch.bfloat16)
    y, (gate, shift, scale) = part(2, 5, width, torch.bfloat16)[0], draw(3, width, dtype=torch.bfloat16)
    results = []
    for functions, stream in ((ours, x), (reference, again)):
        results.append(empty(2, 5, width, torch.bfloat16))
        if residual:
            functions.residual_modulate(stream, y, gate, shift, scale, results[-1])
        else:
            functions.modulate(stream, shift, scale, results[-1])
    assert_same(ScaledTensor(x), ScaledTensor(again))
    near(results[0].values, results[1].values)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("heads", [2, 3, 24])
def test_rotate_leaves_values_alone(ours: ModuleType, heads: int) -> None:
    qkv, norms, angle = draw(2, 7, 3, heads, 128, dtype=torch.bfloat16), draw(2, 128, dtype=torch.bfloat16), draw(5, 64)
    found, expected = qkv.clone(), qkv.clone()
    for functions, copy in ((ours, found), (reference, expected)):
        functions.rotate(copy[:, 2:], *norms, angle.cos(), angle.sin())
    assert torch.equal(found[:, :2], qkv[:, :2])
    assert torch.equal(found[:, :, 2], qkv[:, :, 2])
    assert_same(ScaledTensor(found), ScaledTensor(expected))


def test_8_bits_are_the_references() -> None:
    x, (shift, scale) = part(1, 3, 64, torch.bfloat16)[0], draw(2, 64, dtype=torch.bfloat16)
    found = []
    for functions in (library, reference):
        found.append(empty(1, 3, 64, torch.float32, scaled=True))
        functions.modulate(x, shift, scale, found[-1])
    assert torch.equal(found[0].values, found[1].values)
