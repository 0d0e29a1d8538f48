"""Which mode a model runs in, and what torch and the card must be able to do for `fast`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vortex_core.kernels.scaled_tensor import FP8
from vortex_core.quant.linear import product
from vortex_core.runtime import modes

pytestmark = pytest.mark.usefixtures("seeded")

CPU, CARD = torch.device("cpu"), torch.device("cuda", 7)  # of which there need not be one
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_fp8_products_declines_them(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*arguments: Any) -> None:
        raise error("no such product\nand more")

    monkeypatch.setattr(modes, "product", fail)
    assert modes._fp8_broken.__wrapped__(CPU) == f"torch {torch.__version__} does not: no such product"


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, KeyError("a fault of ours")])
def test_what_says_nothing_of_this_torch_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(modes, "product", fail)
    with pytest.raises(type(error)):
        modes._fp8_broken.__wrapped__(CPU)


def test_the_sample_product_is_in_fp8_with_a_scale_a_row_and_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watched(*arguments: Any) -> None:
        seen.extend(arguments)
        product(*arguments)

    monkeypatch.setattr(modes, "product", watched)
    assert modes._fp8_broken.__wrapped__(CPU) is None
    x, scale, weight, scales, bias, out = seen
    assert (x.dtype, weight.dtype, out.dtype, bias.dtype) == (FP8, FP8, torch.bfloat16, torch.bfloat16)
    assert (x.shape, weight.shape, scale.shape, scales.shape) == ((16, 64), (32, 64), (16,), (32,))
    assert (bias.shape, out.shape) == ((32,), (16, 32))
    seen.clear()
    monkeypatch.setattr(
        modes, "product", lambda *arguments: seen.extend(arguments) or arguments[-1].fill_(64)[0, 0].add_(1)
    )
    assert modes._fp8_broken.__wrapped__(CPU) == "a sample product is wrong"  # one value of all


def test_the_sample_product_is_on_the_device_that_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(modes, "product", lambda *arguments: seen.extend(arguments) or fail())

    def fail() -> None:
        raise RuntimeError("no kernel")

    assert "no kernel" in str(modes._fp8_broken.__wrapped__(torch.device("meta")))
    assert {tensor.device.type for tensor in seen} == {"meta"}


def test_fp8_needs_a_card_that_has_it_and_a_torch_that_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 9)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability if device == CARD else (0, 0))
    monkeypatch.setattr(modes, "_fp8_broken", lambda device: f"torch does not on {device}")
    monkeypatch.setattr(modes, "fused_declined", lambda device: f"no compiler for {device}")
    capability = (8, 8)
    assert modes.fp8_declined(CARD) == "no compiler for cuda:7"
    monkeypatch.setattr(modes, "fused_declined", lambda device: None)
    assert modes.fp8_declined(CARD) == "fp8 needs compute capability 8.9, and this card has 8.8"
    capability = (8, 9)
    assert modes.fp8_declined(CARD) == "torch does not on cuda:7"
