"""NF4 weights on the path that runs anywhere: how they are decoded, what a linear is, who is declined and why."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vortex_core import VortexInputError, kernels, nf4
from vortex_core.kernels import reference
from vortex_core.quant import backends
from vortex_core.quant.backends import (
    Backend,
    BitsAndBytesBackend,
    ReferenceBackend,
    TritonBackend,
    backend_declined,
    bitsandbytes_declined,
    choose_backend,
)
from vortex_core.quant.linear import NF4Linear

pytestmark = pytest.mark.usefixtures("seeded")

CPU, CARD = torch.device("cpu"), torch.device("cuda", 7)  # of which there need not be one
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(params=["reference", "bitsandbytes"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return choose_backend(CPU, request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_lane_is_memory_of_its_own_and_only_inside(backend: Backend, dtype: torch.dtype) -> None:
    first, second = (nf4.quantize(torch.randn(n, 128)) for n in (6, 4))
    wanted = [nf4.dequantize(weight, dtype) for weight in (first, second)]
    lanes = [torch.full((6 * 128 * dtype.itemsize,), 255, dtype=torch.uint8) for _ in range(2)]
    with backend.using(*lanes):
        for lane in (0, 1):
            on_this = [backend.dequantize(first.packed, first.absmax, dtype, None, lane)]
            assert on_this[0].data_ptr() == lanes[lane].data_ptr()
            assert torch.equal(on_this[0], wanted[0])
            other = backend.dequantize(second.packed, second.absmax, dtype, scratch=1 - lane)
            assert other.data_ptr() == lanes[1 - lane].data_ptr()
            assert other.shape == (4, 128)  # of a buffer for the largest
            assert torch.equal(other, wanted[1])
            assert torch.equal(on_this[0], wanted[0])
        assert backend.dequantize(first.packed, first.absmax, dtype).data_ptr() == lanes[0].data_ptr()
        beyond = backend.dequantize(first.packed, first.absmax, dtype, None, 2)
        assert torch.equal(beyond, wanted[0])
        assert beyond.data_ptr() not in [lane.data_ptr() for lane in lanes]
    with pytest.raises(KeyError), backend.using(*lanes):
        raise KeyError
    lanes[0].fill_(255)
    fresh = backend.dequantize(first.packed, first.absmax, dtype)
    assert (fresh.dtype, fresh.device) == (dtype, CPU)
    assert torch.equal(fresh, wanted[0])
    assert bool((lanes[0] == 255).all())


def test_fresh_memory_is_on_the_weights_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "dequantize", lambda *arguments: None)
    weight = nf4.quantize(torch.ones(2, 64)).to(torch.device("meta"))
    assert ReferenceBackend().dequantize(weight.packed, weight.absmax, torch.float32).device.type == "meta"


def test_rows_are_divided_by_their_scales(backend: Backend) -> None:
    weight, scales = nf4.quantize(torch.randn(6, 128)), torch.logspace(-2, 2, 6)
    plain = nf4.dequantize(weight, torch.float32)
    found = backend.dequantize(weight.packed, weight.absmax, torch.float32, scales)
    torch.testing.assert_close(found, plain / scales[:, None])
    assert torch.equal(backend.dequantize(weight.packed, weight.absmax, torch.float32, None), plain)


def test_each_backend_decodes_by_its_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []
    fused = SimpleNamespace(dequantize=lambda *arguments: told.append(("triton", arguments)))
    monkeypatch.setitem(sys.modules, "vortex_core.kernels.fused", fused)
    monkeypatch.setattr(kernels, "fused", fused, raising=False)
    monkeypatch.setattr(reference, "dequantize", lambda *arguments: told.append(("reference", arguments)))
    weight, scales = nf4.quantize(torch.randn(6, 128)), torch.ones(6)
    for name in ("triton", "reference", "bitsandbytes"):
        made = backends._KINDS[name]()
        assert made.name == name
        found = made.dequantize(weight.packed, weight.absmax, torch.float32, scales)
        ((by, (packed, absmax, out, row_scale, *_)),) = told
        told.clear()
        assert by == ("reference" if name == "bitsandbytes" else name)  # which has none that divides
        assert (packed is weight.packed, absmax is weight.absmax, out is found, row_scale is scales) == (True,) * 4
    found = BitsAndBytesBackend().dequantize(weight.packed, weight.absmax, torch.float32)
    assert told == []
    assert torch.equal(found, nf4.dequantize(weight, torch.float32))


def test_a_backend_has_to_say_how_it_decodes() -> None:
    with pytest.raises(TypeError, match="write"):
        Backend()  # type: ignore[abstract]


def test_a_linear_computes_in_the_type_of_its_input() -> None:
    weight, bias = nf4.quantize(torch.randn(6, 128)), torch.randn(6)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 128, dtype=dtype)
        for addend in (None, bias.to(dtype)):
            found = NF4Linear(weight, addend, ReferenceBackend())(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found, F.linear(x, nf4.dequantize(weight, dtype), addend))


def test_a_linear_says_its_sizes_and_backend_and_has_no_weight() -> None:
    made = NF4Linear(nf4.quantize(torch.ones(8, 192)), torch.ones(8), BitsAndBytesBackend())
    assert made.extra_repr() == "in_features=192, out_features=8, backend=bitsandbytes"
    assert made.weight is None
    assert made.row_scale is None
    assert list(dict(made.named_buffers())) == ["packed", "absmax"]
    assert list(dict(made.named_parameters())) == ["bias"]


def test_the_kinds_of_refusal_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "fused_declined", lambda device: f"no compiler for {device}")
    monkeypatch.setattr(backends, "bitsandbytes_declined", lambda device: f"no kernel for {device}")
    assert backend_declined("triton", CARD) == "no compiler for cuda:7"
    assert backend_declined("bitsandbytes", CARD) == "no kernel for cuda:7"
    assert backend_declined("reference", CARD) is None
    for name, why in (("triton", "no compiler for cpu"), ("bitsandbytes", "no kernel for cpu")):
        with pytest.raises(VortexInputError) as caught:
            choose_backend(CPU, name)
        assert str(caught.value) == f"The {name} backend does not work on cpu: {why}"
    with pytest.raises(VortexInputError) as caught:
        choose_backend(CPU, "x" * 500)
    assert str(caught.value).startswith("Unknown backend 'xxx")
    assert str(caught.value).endswith("; choose 'triton', 'nvrtc', 'bitsandbytes' or 'reference'.")
    assert len(str(caught.value)) < 300


def test_the_log_says_which_backend_and_warns_of_the_slow_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vortex_core.quant.backends")
    reasons: dict[str, str | None] = {"triton": None, "nvrtc": None, "bitsandbytes": None}
    monkeypatch.setattr(backends, "fused_declined", lambda device: reasons["triton"])
    monkeypatch.setattr(backends, "compiled_declined", lambda device: reasons["nvrtc"])
    monkeypatch.setattr(backends.nf4, "pairs_of", lambda device: None)  # there is no such card
    monkeypatch.setattr(backends, "bitsandbytes_declined", lambda device: reasons["bitsandbytes"])
    choices: list[tuple[torch.device, str | None]] = [(CARD, None), (CPU, None), (CARD, "reference"), (CPU, "triton")]
    kinds = [type(choose_backend(*choice)) for choice in choices]
    reasons["triton"] = "no compiler"
    kinds.append(type(choose_backend(CARD)))
    reasons["nvrtc"] = "no NVRTC"
    kinds += [type(choose_backend(CARD)), type(choose_backend(CARD, "bitsandbytes"))]
    reasons["bitsandbytes"] = "no kernel"
    kinds.append(type(choose_backend(CARD)))
    assert [(kind.name, record.levelname, record.getMessage()) for kind, record in zip(
        kinds, caplog.records, strict=True)] == [
        ("triton", "INFO", "NF4 backend: triton on cuda:7 (the fastest)"),
        ("reference", "INFO", "NF4 backend: reference on cpu (the fastest)"),
        ("reference", "INFO", "NF4 backend: reference on cuda:7 (asked for)"),
        ("triton", "INFO", "NF4 backend: triton on cpu (asked for)"),
        ("nvrtc", "INFO", "NF4 backend: nvrtc on cuda:7 (triton declined: no compiler)"),
        ("bitsandbytes", "INFO",
         "NF4 backend: bitsandbytes on cuda:7 (triton declined: no compiler; nvrtc declined: no NVRTC)"),
        ("bitsandbytes", "INFO", "NF4 backend: bitsandbytes on cuda:7 (asked for)"),
        ("reference", "WARNING",
         "NF4 backend: reference on cuda:7 (triton declined: no compiler; nvrtc declined: no NVRTC; "
         "bitsandbytes declined: no kernel)"),
    ]  # fmt: skip
    assert kinds[0] is TritonBackend


def test_bitsandbytes_is_tried_on_a_sample_of_every_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor, torch.dtype]] = []
    decode = BitsAndBytesBackend.dequantize

    def watched(backend: Backend, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append((packed, absmax, dtype))
        return decode(backend, packed, absmax, dtype)

    monkeypatch.setattr(BitsAndBytesBackend, "dequantize", watched)
    assert bitsandbytes_declined(CPU) is None
    ((packed, absmax, dtype),) = seen
    assert sorted(packed.flatten().tolist()) == list(range(256))  # both nibbles in every pair
    assert (packed.dtype, packed.shape, absmax.shape, dtype) == (torch.uint8, (4, 64), (4, 2), torch.float32)
    assert len(set(absmax.flatten().tolist())) == 8
    monkeypatch.setattr(backends, "missing", lambda module: f"is not here ({module})")
    assert bitsandbytes_declined(CPU) == "it is not here (bitsandbytes)"
    assert len(seen) == 1


def test_the_sample_is_on_the_device_that_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(backend: Backend, packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        seen.extend((packed, absmax))
        raise ValueError("no kernel\nand more")

    monkeypatch.setattr(BitsAndBytesBackend, "dequantize", watched)
    assert bitsandbytes_declined(torch.device("meta")) == "no kernel"
    assert [tensor.device.type for tensor in seen] == ["meta", "meta"]
