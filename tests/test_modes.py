"""Which precision a mode gets on which card, and what torch and the kernels must be able to do for it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vortex_core.errors import VortexInputError
from vortex_core.kernels import ScaledTensor, compiled, reference
from vortex_core.kernels.scaled_tensor import FP8
from vortex_core.quant.backends import Backend, NvrtcBackend, ReferenceBackend, TritonBackend
from vortex_core.quant.precision import EXACT, Fp8, Int8, Precision
from vortex_core.runtime import modes
from vortex_core.runtime.modes import choose_precision

pytestmark = pytest.mark.usefixtures("seeded")

CPU, CARD = torch.device("cpu"), torch.device("cuda", 7)  # of which there need not be one
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
BF16 = torch.bfloat16


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card on which everything runs: its capability, what is declined there, and the milliseconds of a product."""
    state: dict[str, Any] = {"capability": (9, 0), "fp8": None, "fused": None, "compiled": None, "ms": {}}
    state["sample", "int8"] = state["sample", "fp8"] = None
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: state["capability"])
    monkeypatch.setattr(modes, "fused_declined", lambda device: state["fused"])
    monkeypatch.setattr(modes, "compiled_declined", lambda device: state["compiled"])
    monkeypatch.setattr(modes, "_fp8_broken", lambda device: state["fp8"])
    monkeypatch.setattr(modes, "_sample_broken", lambda name, *others: state["sample", name])
    monkeypatch.setattr(modes, "attends_in_fp8", lambda device: state["capability"] == (9, 0) and not state["fused"])
    monkeypatch.setattr(modes, "_time", lambda precision, device: state["ms"][precision.name])
    return state


def chosen(mode: str, backend: Backend | None = None, dtype: torch.dtype = BF16) -> Precision:
    return choose_precision(mode, CARD, dtype, backend or TritonBackend(), reference).precision


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "int8"), ((8, 6), "int8"), ((8, 7), "int8"), ((8, 9), "int8"), ((9, 0), "fp8")]
)
def test_fast_is_int8_on_rtx_30_and_40_and_fp8_on_hopper(
    card: dict[str, Any], capability: tuple[int, int], name: str
) -> None:
    card["capability"] = capability
    assert chosen("fast").name == name
    assert chosen("fast").fp8_attention == (name == "fp8")
    assert chosen("exact") is EXACT
    assert chosen("int8") == Int8(reference)
    if capability >= (8, 9):
        assert chosen("fp8") == Fp8(fp8_attention=capability == (9, 0))


@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_a_card_that_nobody_measured_gets_what_is_faster(
    card: dict[str, Any], capability: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    card["capability"] = capability
    card["ms"] = {"int8": 0.5, "fp8": 0.9}
    assert chosen("fast").name == "int8"
    assert "0.500 ms in int8, 0.900 ms in fp8" in caplog.text
    card["ms"] = {"int8": 0.9, "fp8": 0.5}
    assert chosen("fast") == Fp8()
    card["fp8"], card["ms"] = "broken", {}  # of one alone nothing is timed
    assert chosen("fast").name == "int8"


def test_what_is_left_is_taken_and_the_log_says_why(card: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    card["sample", "int8"], card["capability"] = "Triton is moody", (8, 9)
    assert chosen("fast").name == "fp8"
    assert "Precision: fp8 (the only one in 8 bits that runs here; int8 declined: Triton is moody)" in caplog.text
    card["capability"] = (8, 6)
    assert chosen("fast") is EXACT
    told = caplog.records[-1]
    assert told.levelno == logging.WARNING
    assert told.getMessage() == (
        "Precision: exact (nothing in 8 bits runs here; int8 declined: Triton is moody; "
        "fp8 declined: fp8 needs compute capability 8.9, and this card has 8.6)"
    )
    card["capability"], card["fp8"] = (9, 0), "no such product"
    assert chosen("fast") is EXACT
    card["sample", "int8"] = None
    assert chosen("fast").name == "int8"


def test_what_is_asked_for_by_name_and_cannot_run_is_refused(card: dict[str, Any]) -> None:
    card["capability"] = (8, 6)
    with pytest.raises(VortexInputError, match=r"'fp8' does not work here: fp8 needs compute capability 8\.9, .* 8\.6"):
        chosen("fp8")
    card["sample", "int8"] = "a sample differs"
    with pytest.raises(VortexInputError, match=r"'int8' does not work here: a sample differs\. 'fast' takes"):
        chosen("int8")


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_8_bits_need_nf4_kernels_that_decode_it_and_bf16(card: dict[str, Any], name: str) -> None:
    for backend, dtype, words in (
        (None, BF16, "it multiplies NF4 weights"),
        (ReferenceBackend(), BF16, "only the triton and nvrtc backends decode to 8 bits, and it is reference"),
        (TritonBackend(), torch.float16, "end in bf16, and torch.float16 was asked for"),
    ):
        with pytest.raises(VortexInputError, match=words):
            choose_precision(name, CARD, dtype, backend, reference)
        assert choose_precision("fast", CARD, dtype, backend, reference).precision is EXACT
    card["fused"] = "Triton is not installed"
    with pytest.raises(VortexInputError, match=r"it is reference\. .* Leave the backend to Vortex"):
        choose_precision(name, CARD, BF16, ReferenceBackend(), reference)
    card["compiled"] = "no NVRTC"
    with pytest.raises(VortexInputError, match="Triton is not installed"):
        choose_precision(name, CARD, BF16, ReferenceBackend(), reference)


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "int8"), ((8, 6), "int8"), ((8, 9), "int8"), ((9, 0), "fp8"), ((12, 0), "int8")]
)
def test_without_triton_fast_is_the_same(card: dict[str, Any], capability: tuple[int, int], name: str) -> None:
    card["fused"], card["capability"], card["ms"] = "as on Windows", capability, {"int8": 0.5, "fp8": 0.9}
    found = choose_precision("fast", CARD, BF16, NvrtcBackend(), compiled).precision
    assert found == (Int8(compiled) if name == "int8" else Fp8(fp8_attention=False))  # attention in fp8 is Triton's
    card["sample", name] = "its kernels do not run"
    assert choose_precision("fast", CARD, BF16, NvrtcBackend(), compiled).precision.name != name


def test_on_the_cpu_fast_is_exact_and_8_bits_run_by_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    backend = ReferenceBackend()
    assert choose_precision("fast", CPU, torch.float32, backend, reference).precision is EXACT
    assert "Precision: exact (products in 8 bits gain nothing on cpu)" in caplog.text
    assert choose_precision("int8", CPU, torch.float32, backend, reference).precision == Int8(reference)
    assert choose_precision("fp8", CPU, torch.float32, backend, reference).precision == Fp8(fp8_attention=True)
    with pytest.raises(VortexInputError, match="it multiplies NF4 weights"):
        choose_precision("int8", CPU, torch.float32, None, reference)


def test_a_product_is_timed_in_each_precision() -> None:
    seen: list[tuple[Any, ...]] = []

    class Watched(Int8):
        def product(self, *arguments: Any, gelu: bool = False) -> None:
            seen.append(arguments)

    assert 0 <= modes._time(Watched(), CPU) < 1000
    x, scale, weight, scales, bias, out = seen[-1]
    assert (x.dtype, weight.dtype, out.dtype) == (torch.int8, torch.int8, BF16)
    assert (x.shape, weight.shape, out.shape) == ((1280, 3072), (12288, 3072), (1280, 12288))
    assert (scale.shape, scales.shape, bias.shape) == ((1280,), (12288,), (12288,))
    assert x.float().std() > 10
    assert len(seen) > 3


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_fp8_products_declines_them(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*arguments: Any) -> None:
        raise error("no such product\nand more")

    monkeypatch.setattr(Fp8, "product", fail)
    assert modes._fp8_broken.__wrapped__(CPU) == f"torch {torch.__version__} does not: no such product"


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, KeyError("a fault of ours")])
def test_what_says_nothing_of_this_torch_is_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(Fp8, "product", fail)
    with pytest.raises(type(error)):
        modes._fp8_broken.__wrapped__(CPU)


def test_the_sample_product_is_in_fp8_with_a_scale_a_row_and_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    product = Fp8.product

    def watched(self: Fp8, *arguments: Any) -> None:
        seen.extend(arguments)
        product(self, *arguments)

    monkeypatch.setattr(Fp8, "product", watched)
    assert modes._fp8_broken.__wrapped__(CPU) is None
    x, scale, weight, scales, bias, out = seen
    assert (x.dtype, weight.dtype, out.dtype, bias.dtype) == (FP8, FP8, BF16, BF16)
    assert (x.shape, weight.shape, scale.shape, scales.shape) == ((16, 64), (32, 64), (16,), (32,))
    assert (bias.shape, out.shape) == ((32,), (16, 32))
    monkeypatch.setattr(Fp8, "product", lambda self, *arguments: arguments[-1].fill_(64)[0, 0].add_(1))
    assert modes._fp8_broken.__wrapped__(CPU) == "a sample product is wrong"  # one value of all


def test_the_sample_product_is_on_the_device_that_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def fail(self: Fp8, *arguments: Tensor) -> None:
        seen.extend(arguments)
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Fp8, "product", fail)
    assert "no kernel" in str(modes._fp8_broken.__wrapped__(torch.device("meta")))
    assert {tensor.device.type for tensor in seen} == {"meta"}


def test_fp8_needs_a_card_that_has_it_and_a_torch_that_multiplies(card: dict[str, Any]) -> None:
    card["capability"], card["fp8"] = (8, 8), "torch does not"
    assert modes.fp8_declined(CARD) == ("fp8 needs compute capability 8.9, and this card has 8.8", "")
    card["capability"] = (8, 9)
    declined = modes.fp8_declined(CARD)
    assert declined is not None
    assert declined.why == "torch does not"
    card["fp8"] = None
    assert modes.fp8_declined(CARD) is None


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("is not there", "pip install triton"), (None, "a C compiler")],
)
def test_a_choice_says_what_would_make_it_faster(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, missing: str | None, fix: str
) -> None:
    monkeypatch.setattr(modes, "missing", lambda module: missing)
    monkeypatch.setattr(modes, "remedy", lambda module: f"pip install {module}")
    card["fused"], card["compiled"] = "Triton does not run", "no NVRTC"
    choice = choose_precision("fast", CARD, BF16, ReferenceBackend(), reference)
    assert choice.precision is EXACT
    assert fix in choice.declined["int8"].fix
    assert choice.reason.startswith("nothing in 8 bits runs here; int8 declined: Triton does not run; fp8 declined: ")


def test_a_choice_says_why_it_is_the_fastest(card: dict[str, Any]) -> None:
    def because(capability: tuple[int, int]) -> str:
        card["capability"] = capability
        return choose_precision("fast", CARD, BF16, TritonBackend(), reference).because

    card["ms"] = {"int8": 0.5, "fp8": 0.9}
    assert because((8, 6)) == "the only one in 8 bits that runs here"
    assert because((8, 9)) == "the fastest on compute capability 8.9, by its rates"
    assert because((9, 0)) == "the fastest that was measured on compute capability 9.0"
    assert because((12, 0)) == "the fastest here: a product takes 0.500 ms in int8, 0.900 ms in fp8"
    assert choose_precision("int8", CARD, BF16, TritonBackend(), reference).reason == "asked for"


def spoil_row_scales(packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    out.mul_(0.25)


def spoil_dequantize(packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor) -> None:
    out[3].neg_()


def spoil_quantize(x: Tensor, out: ScaledTensor) -> None:
    out.values[:, 5].neg_()


def spoil_multiply_int8(x: Tensor, *rest: Tensor) -> None:
    rest[-1][:, 1].mul_(1.5)


class Twin(Backend):
    """Decodes by a twin of the reference."""

    name = "twin"

    def __init__(self, twin: Any) -> None:
        super().__init__()
        self._twin = twin

    def write(self, packed: Tensor, absmax: Tensor, out: Tensor, row_scale: Tensor | None) -> None:
        self._twin.dequantize(packed, absmax, out, row_scale)

    def row_scales(self, packed: Tensor, absmax: Tensor, out: Tensor, dtype: torch.dtype, adapter: Any = None) -> None:
        self._twin.row_scales(packed, absmax, out, dtype)


SPOILS = [spoil_row_scales, spoil_dequantize, spoil_quantize, spoil_multiply_int8]


@pytest.mark.parametrize(("name", "spoil"), [*(("int8", spoil) for spoil in SPOILS), ("fp8", spoil_row_scales)])
def test_a_sample_finds_each_kernel_that_is_wrong(name: str, spoil: Any) -> None:
    """A twin of the reference in place of kernels, with one function of four that is wrong in places."""
    twin = SimpleNamespace(**vars(reference))
    assert modes._sample_broken(name, CPU, Twin(twin), twin) is None
    function = spoil.__name__.removeprefix("spoil_")

    def wrong(*arguments: Any) -> None:
        getattr(reference, function)(*arguments)
        spoil(*arguments)

    setattr(twin, function, wrong)
    told = f"a product in {name} differs from the reference on a sample"
    assert modes._sample_broken(name, CPU, Twin(twin), twin) == told


def test_what_fails_in_a_sample_is_told_but_for_memory() -> None:
    twin = SimpleNamespace(**vars(reference))

    def fail(*arguments: Any) -> None:
        raise error

    twin.multiply_int8 = fail
    error: Exception = KeyError("no compiler")
    assert modes._sample_broken("int8", CPU, Twin(twin), twin) == "its kernels do not run ('no compiler')"
    error = OUT_OF_MEMORY
    with pytest.raises(torch.OutOfMemoryError):
        modes._sample_broken("int8", CPU, Twin(twin), twin)
