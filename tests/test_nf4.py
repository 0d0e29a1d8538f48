"""The NF4 format and the linear over it, against bitsandbytes and the naive reference."""

import logging

import bitsandbytes.functional as bnb
import pytest
import torch

from vortex_core import VortexCheckpointError, VortexInputError, nf4
from vortex_core.quant.backends import BitsAndBytesBackend, ReferenceBackend, bitsandbytes_declined, choose_backend
from vortex_core.quant.linear import NF4Linear
from vortex_core.quant.precision import Fp8

CPU = torch.device("cpu")
SHAPES = [(1, 64), (3, 128), (65, 192), (130, 320)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_equals_the_naive_quantizer(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, naive = nf4.quantize(weight), nf4.quantize_reference(weight)
    assert ours.shape == naive.shape == shape
    assert torch.equal(ours.absmax, naive.absmax)
    assert torch.equal(ours.packed, naive.packed)


def test_bitsandbytes_quantizes_where_it_does_so_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("libbitsandbytes_cpu.so: cannot open shared object file")

    assert nf4._declined(CPU) is None
    weight, real = torch.randn(65, 192, generator=torch.Generator().manual_seed(0)), bnb.quantize_4bit
    ours, naive = nf4._quantize_bitsandbytes(weight), nf4.quantize_reference(weight)
    assert torch.equal(ours.packed, naive.packed)
    assert torch.equal(ours.absmax, naive.absmax)
    monkeypatch.setattr(bnb, "quantize_4bit", fail)
    assert "cannot open shared object" in str(nf4._declined(CPU))
    monkeypatch.setattr(bnb, "quantize_4bit", lambda w, **options: real(w + 1, **options))
    assert "differs from the reference" in str(nf4._declined(CPU))
    monkeypatch.setattr(nf4, "missing", lambda module: "does not import (No module named 'bitsandbytes')")
    assert "does not import" in str(nf4._declined(CPU))


def test_without_bitsandbytes_it_is_quantized_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = torch.device("cuda", 7)  # of which there need not be one
    monkeypatch.setattr(nf4, "_declined", lambda device: "it is broken")
    assert nf4._quantizer.__wrapped__(card) is nf4.quantize_reference
    assert "bitsandbytes declined on cuda:7: it is broken" in caplog.text
    monkeypatch.setattr(nf4, "_declined", lambda device: None)
    assert nf4._quantizer.__wrapped__(card) is nf4._quantize_bitsandbytes
    assert nf4._quantizer.__wrapped__(CPU) is nf4.quantize_reference


def test_the_reference_quantizes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 128)
    whole = nf4.quantize_reference(weight)
    monkeypatch.setattr(nf4, "CHUNK", 300)
    parts = nf4.quantize_reference(weight)
    assert torch.equal(whole.packed, parts.packed)
    assert torch.equal(whole.absmax, parts.absmax)


def test_zero_blocks_decode_to_zero() -> None:
    weight = torch.zeros(2, 128)
    weight[1, 64:] = 1
    for quantize in (nf4.quantize, nf4.quantize_reference):
        assert torch.equal(nf4.dequantize(quantize(weight), torch.float32), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_equals_bitsandbytes(dtype: torch.dtype) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(96, 192), blocksize=64, quant_type="nf4")
    state.dtype = dtype
    ours = nf4.dequantize(nf4.NF4Weight(packed.view(96, 96), state.absmax.view(96, 3)), dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(bad: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = bad
    with pytest.raises(VortexCheckpointError, match=r"img_mlp\.0 holds NaN or infinite"):
        nf4.quantize(weight, "img_mlp.0")


def test_a_width_that_is_no_multiple_of_64_is_refused() -> None:
    with pytest.raises(VortexCheckpointError, match="divisible by 64"):
        nf4.quantize(torch.ones(2, 96))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_backends_agree(shape: tuple[int, int], tokens: int) -> None:
    weight, bias = nf4.quantize(torch.randn(shape)), torch.randn(shape[0])
    x = torch.randn(2, tokens, shape[1])
    expected = x @ nf4.dequantize(weight, torch.float32).T + bias
    for backend in (ReferenceBackend(), BitsAndBytesBackend()):
        torch.testing.assert_close(NF4Linear(weight, bias, backend)(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_backends_agree_on_cuda_without_allocating() -> None:
    cuda = torch.device("cuda", 0)
    weight = nf4.quantize(torch.randn(3072, 12288, device=cuda, dtype=torch.bfloat16))
    backend = BitsAndBytesBackend()
    lane = torch.empty(3072 * 12288 * 2, dtype=torch.uint8, device=cuda)
    before = torch.cuda.memory_allocated()
    with backend.using(lane):
        ours = backend.dequantize(weight.packed, weight.absmax, torch.bfloat16)
    assert torch.cuda.memory_allocated() == before
    assert ours.data_ptr() == lane.data_ptr()
    assert torch.equal(ours, nf4.dequantize(weight, torch.bfloat16))


def test_the_choice_of_backend_says_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "vortex_core")
    card = torch.device("cuda", 7)  # of which there need not be one
    assert choose_backend(CPU).name == choose_backend(CPU, "reference").name == "reference"
    assert choose_backend(CPU, "bitsandbytes").name == "bitsandbytes"
    monkeypatch.setattr("vortex_core.quant.backends.fused_declined", lambda device: "no compiler")
    monkeypatch.setattr("vortex_core.quant.backends.compiled_declined", lambda device: "no NVRTC")
    monkeypatch.setattr("vortex_core.quant.backends.bitsandbytes_declined", lambda device: None)
    monkeypatch.setattr(nf4, "pairs_of", lambda device: None)
    assert choose_backend(card).name == "bitsandbytes"
    assert "NF4 backend: bitsandbytes on cuda:7 (triton declined: no compiler; nvrtc declined: no NVRTC)" in caplog.text
    monkeypatch.setattr("vortex_core.quant.backends.bitsandbytes_declined", lambda device: "no kernel for it")
    assert choose_backend(card).name == "reference"
    assert "bitsandbytes declined: no kernel for it" in caplog.text
    with pytest.raises(VortexInputError, match="no kernel for it"):
        choose_backend(CPU, "bitsandbytes")
    monkeypatch.setattr("vortex_core.quant.backends.fused_declined", lambda device: None)
    assert choose_backend(card).name == "triton"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(VortexInputError, match="'triton', 'nvrtc', 'bitsandbytes' or 'reference'"):
        choose_backend(CPU, "gguf")


def test_bitsandbytes_is_declined_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BitsAndBytesBackend, "dequantize", lambda *a: torch.zeros(4, 128))
        assert bitsandbytes_declined(CPU) == "a sample differs from the reference"

        def fail(*arguments: object) -> None:
            raise RuntimeError("no kernel image\nmore")

        patch.setattr(BitsAndBytesBackend, "dequantize", fail)
        assert bitsandbytes_declined(CPU) == "no kernel image"

        def full(*arguments: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(BitsAndBytesBackend, "dequantize", full)
        with pytest.raises(torch.OutOfMemoryError):  # no word on bitsandbytes, so no other backend for it
            bitsandbytes_declined(CPU)
        patch.setitem(__import__("sys").modules, "bitsandbytes", None)
        assert "does not import" in (bitsandbytes_declined(CPU) or "")


def test_a_linear_shows_what_it_is() -> None:
    linear = NF4Linear(nf4.quantize(torch.ones(8, 64)), None, ReferenceBackend())
    assert "in_features=64, out_features=8, backend=reference" in repr(linear)


def test_rows_are_joined_and_halved_bit_for_bit() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    whole = nf4.quantize(weight)
    upper, lower = whole.halves()
    for half, rows in ((upper, weight[:3]), (lower, weight[3:])):
        alone = nf4.quantize(rows)
        assert half.shape == (3, 128)
        assert torch.equal(half.packed, alone.packed)
        assert torch.equal(half.absmax, alone.absmax)
    joined = nf4.join([lower, upper])
    assert torch.equal(nf4.dequantize(joined, torch.float32), nf4.dequantize(whole, torch.float32).roll(3, 0))


def test_all_of_a_weight_is_on_its_device() -> None:
    meta = torch.device("meta")
    moved = nf4.quantize(torch.ones(2, 64)).to(meta)
    made = nf4.quantize_reference(torch.empty(2, 64, device=meta))
    for weight in (moved, made):
        assert (weight.packed.device, weight.absmax.device) == (meta, meta)
    assert nf4.dequantize(made, torch.float32).device == meta
    assert made.packed.dtype == torch.uint8


def test_a_scale_for_each_row_moves_with_the_weight() -> None:
    linear = NF4Linear(nf4.quantize(torch.ones(2, 64)), None, ReferenceBackend())
    linear.use(Fp8())
    assert set(dict(linear.named_buffers())) == {"packed", "absmax", "row_scale"}
    assert linear.row_scale is not None
    assert linear.row_scale.shape == (2,)


def test_decoding_goes_chunk_by_chunk_in_the_memory_that_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nf4.quantize(torch.randn(7, 128))
    expected = nf4.dequantize(weight, torch.float32)
    monkeypatch.setattr(nf4, "CHUNK", 2 * 128)
    sizes = []
    embedding = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional,
        "embedding",
        lambda codes, table: sizes.append(2 * codes.numel()) or embedding(codes, table),
    )
    out = torch.full((7, 128), float("nan"))
    assert nf4.dequantize(weight, torch.float32, out) is out
    assert torch.equal(out, expected)
    assert sizes == [256, 256, 256, 128]
    monkeypatch.setattr(nf4, "CHUNK", 1)  # a row is more than a chunk
    assert torch.equal(nf4.dequantize(weight, torch.float32), expected)
