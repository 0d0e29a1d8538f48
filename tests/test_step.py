"""One step as a fixed sequence over given buffers: products, plans, and how far `fast` may be from `exact`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from engine_parts import painter_of
from torch import Tensor, nn
from torch.nn import Linear

from vortex_core import Engine, load_flux_schnell, nf4
from vortex_core.flux1 import sampling
from vortex_core.flux1.step_buffers import StepBuffers
from vortex_core.flux1.transformer import Transformer
from vortex_core.kernels import ScaledTensor, reference
from vortex_core.kernels.scaled_tensor import FP8
from vortex_core.memory.arena import Region
from vortex_core.memory.offload import Prefetcher
from vortex_core.memory.planner import smallest_budget
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.quant.linear import NF4Linear, multiply, product
from vortex_core.runtime.graphs import BoundStep, GraphCache, PiecewiseGraph, step_bytes

CPU = torch.device("cpu")
SIZES = [(64, 64, 1), (128, 80, 2), (64, 96, 3)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def transformer(engine: Engine) -> Transformer:
    shared = painter_of(engine).model.transformer
    yield shared
    shared.use(reference, fast=False)
    for linear in shared.linears():
        linear.row_scale = None  # what `fast` adds


def rope(engine: Engine, height: int, width: int) -> tuple[Tensor, Tensor]:
    return sampling.rope(sampling.positions(height, width, 256), painter_of(engine).model.flux, CPU)


def size_of(height: int, width: int, batch: int) -> tuple[int, int, int]:
    return batch, 256, height // 16 * width // 16


def request(
    engine: Engine, height: int, width: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(height + width)
    img = torch.randn(batch, height // 16 * width // 16, 64, generator=draw)
    txt = torch.randn(batch, 256, painter_of(engine).model.flux.hidden, generator=draw)
    modulation = (
        torch.randn(painter_of(engine).model.flux.modulation_rows, painter_of(engine).model.flux.hidden, generator=draw)
        / 4
    )
    return img, txt, modulation, rope(engine, height, width)


@pytest.mark.parametrize("fast", [False, True])
@torch.inference_mode()
def test_steps_of_several_sizes_share_memory_and_stay_right(
    engine: Engine, transformer: Transformer, fast: bool
) -> None:
    transformer.use(reference, fast=fast, fp8_attention=fast)
    largest = max(step_bytes(painter_of(engine).model.flux, size_of(*size), torch.float32, fast=fast) for size in SIZES)
    memory = torch.empty(largest, dtype=torch.uint8)
    steps = {size: BoundStep(transformer, size_of(*size), Region(memory)) for size in SIZES}
    for size in [*SIZES, *SIZES]:
        arguments = request(engine, *size)
        memory.fill_(0xFF)  # NaN in every type
        assert torch.equal(steps[size](*arguments), transformer(*arguments))


@pytest.mark.parametrize("fast", [False, True])
@torch.inference_mode()
def test_a_step_takes_the_bytes_that_were_planned(engine: Engine, transformer: Transformer, fast: bool) -> None:
    transformer.use(reference, fast=fast, fp8_attention=fast)
    for height, width, batch in SIZES:
        size = size_of(height, width, batch)
        memory = torch.empty(
            step_bytes(painter_of(engine).model.flux, size, torch.float32, fast=fast), dtype=torch.uint8
        )
        BoundStep(transformer, size, Region(memory))(*request(engine, height, width, batch))
        with pytest.raises(ValueError, match="A plan is too small"):
            BoundStep(transformer, size, Region(memory[:-256]))


@torch.inference_mode()
def test_a_replay_reads_its_inputs_and_lays_out_no_step(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, (first, second) = size_of(128, 80, 2), [request(engine, 128, 80, 2) for _ in range(2)]
    second[0].neg_()
    memory = torch.empty(step_bytes(painter_of(engine).model.flux, size, torch.float32, fast=False), dtype=torch.uint8)
    captured = BoundStep(transformer, size, Region(memory))
    captured(*first)
    graph = SimpleNamespace(replay=captured.run)  # in that memory, whoever filled it
    monkeypatch.setattr(Transformer, "step", lambda *arguments: pytest.fail("laid out"))
    replayed = BoundStep(transformer, size, Region(memory))(*second, graph).clone()
    monkeypatch.undo()
    assert torch.equal(replayed, transformer(*second))


class Captures:
    """A card that captures: what is launched for a graph runs when that is replayed, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[tuple[int, int, int]] = []
        self.replays = 0
        monkeypatch.setattr(Transformer, "fused", property(lambda transformer: True))
        monkeypatch.setattr(GraphCache, "_record", lambda graphs, step, prefetcher: self.record(step))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

    def record(self, step: BoundStep) -> SimpleNamespace:
        self.captured.append(step._size)

        def replay() -> None:
            self.replays += 1
            step.run()

        return SimpleNamespace(replay=replay)


def region(engine: Engine, size: tuple[int, int, int]) -> Region:
    return Region(
        torch.empty(step_bytes(painter_of(engine).model.flux, size, torch.float32, fast=False), dtype=torch.uint8)
    )


@torch.inference_mode()
def test_a_graph_is_found_at_the_addresses_it_was_captured_with_alone(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, graphs = Captures(monkeypatch), GraphCache(transformer, CPU)
    size, arguments = size_of(128, 80, 1), request(engine, 128, 80, 1)
    first, second, expected = region(engine, size), region(engine, size), transformer(*arguments)

    def draw(memory: torch.Tensor, address: tuple[int, ...], start: int = 0) -> int:
        """How many were captured so far."""
        velocity = graphs.open(size, Region(memory, start), Prefetcher([], CPU), lambda: address)
        assert torch.equal(velocity(*arguments), expected)
        return len(card.captured)

    assert [draw(first.memory, (1, 2)) for _ in range(3)] == [1, 1, 1]
    assert card.replays == 2
    assert draw(first.memory, (1, 3)) == 2  # weights moved, or cuBLAS' workspaces
    assert graphs.sizes == (size,)  # what nobody can find any more is gone
    assert draw(second.memory, (1, 3)) == 3  # the arena moved
    longer = torch.cat((torch.empty(256, dtype=torch.uint8), second.memory))
    assert draw(longer, (1, 3), 256) == 4  # staging or decoded weights grew before it
    assert draw(longer, (1, 3), 256) == 4
    graphs.clear()
    assert (graphs.sizes, graphs.nbytes) == ((), 0)
    assert draw(longer, (1, 3), 256) == 5


@torch.inference_mode()
def test_the_graphs_of_the_sizes_drawn_last_are_kept(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Captures(monkeypatch)
    graphs, lent = GraphCache(transformer, CPU), []
    largest = size_of(128, 80, 3)
    img, txt, modulation, pe = request(engine, 128, 80, 3)
    memory = region(engine, largest).memory

    @contextmanager
    def lend() -> Iterator[None]:
        lent.append(1)
        yield

    monkeypatch.setattr("vortex_core.runtime.graphs.KEPT", 2)
    for counts in ((3, 2), (3,), (1,)):
        velocity = graphs.open(largest, Region(memory), Prefetcher([], CPU), tuple, lend)
        for count in counts:
            velocity(img[:count], txt[:count], modulation, pe)
    assert [size[0] for size in graphs.sizes] == [3, 1]
    assert len(lent) == 3  # what is replayed needs no memory of libraries


def test_a_piecewise_graph_replays_graphs_and_what_the_host_does_between(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Graph:
        names = iter("abc")

        def capture_begin(self, pool: str, capture_error_mode: str) -> None:
            self.name = next(self.names)
            told.append(f"{pool}: {self.name} begins")

        def capture_end(self) -> None:
            told.append(f"{self.name} ends")

        def replay(self) -> None:
            told.append(self.name)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    recording = PiecewiseGraph("pool")
    with recording.capture():
        recording.between(lambda: told.append("fetch"))
        recording.between(lambda: told.append("leave"))
    assert told == ["pool: a begins", "a ends", "pool: b begins", "b ends", "pool: c begins", "c ends"]
    told.clear()
    recording.replay()
    recording.replay()
    assert told == ["a", "fetch", "b", "leave", "c"] * 2
    Graph.names = iter("de")
    with pytest.raises(ValueError, match="no"), PiecewiseGraph("pool").capture():
        raise ValueError("no")
    assert told[-1] == "d ends"  # or nothing else could be captured

    errors = iter(["it is broken", "nothing is captured"])

    def fails(graph: Graph) -> None:
        raise RuntimeError(next(errors))

    monkeypatch.setattr(Graph, "capture_end", fails)
    recording = PiecewiseGraph("pool")
    with pytest.raises(RuntimeError, match="it is broken"), recording.capture():
        recording.between(lambda: None)
    assert next(errors, None) is None


@torch.inference_mode()
def test_a_capture_that_fails_leaves_no_graph_and_no_pool(
    engine: Engine, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, graphs = Captures(monkeypatch), GraphCache(transformer, CPU)
    size, arguments = size_of(128, 80, 2), request(engine, 128, 80, 2)
    velocity = graphs.open(size, region(engine, size), Prefetcher([], CPU))
    one = (arguments[0][:1], arguments[1][:1], *arguments[2:])
    expected = velocity(*one).clone()
    assert graphs.sizes == (size_of(128, 80, 1),)
    pools = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(1) or object())
    with monkeypatch.context() as context:

        def fails(step: BoundStep) -> SimpleNamespace:
            raise KeyboardInterrupt

        context.setattr(card, "record", fails)
        with pytest.raises(KeyboardInterrupt):
            velocity(*arguments)
    assert (graphs.sizes, graphs.nbytes) == ((), 0)
    before = len(pools)
    assert torch.equal(velocity(*one), expected)
    assert len(pools) == before + 1  # the old one may be none any more
    assert torch.equal(velocity(*one), expected)
    assert card.replays == 1


@torch.inference_mode()
def test_slices_of_several_sizes_share_a_region(engine: Engine, transformer: Transformer) -> None:
    graphs = GraphCache(transformer, CPU)
    img, txt, modulation, pe = request(engine, 128, 80, 3)
    size = size_of(128, 80, 2)
    velocity = graphs.open(size, region(engine, size), Prefetcher([], CPU))
    parts = [velocity(part, txt[: len(part)], modulation, pe).clone() for part in img.split(2)]
    assert torch.equal(parts[1], transformer(img[2:], txt[:1], modulation, pe))
    assert torch.equal(parts[0], transformer(img[:2], txt[:2], modulation, pe))
    assert (graphs.nbytes, graphs.sizes) == (0, ())  # nothing is captured on the CPU


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("width", [80, 144])  # 40 and 72 tokens
@torch.inference_mode()
def test_pictures_of_a_batch_equal_singles(engine: Engine, transformer: Transformer, fast: bool, width: int) -> None:
    transformer.use(reference, fast=fast)
    img, txt, modulation, pe = request(engine, 128, width, 3)
    together = transformer(img, txt, modulation, pe)
    for i in range(3):
        alone = transformer(img[i : i + 1], txt[i : i + 1], modulation, pe)
        bound = 0.05 * float(alone.abs().max()) if fast else 1e-4  # of rounding to fp8
        torch.testing.assert_close(together[i : i + 1], alone, atol=bound, rtol=1e-4)


def test_the_library_takes_every_pictures_scales_aligned(engine: Engine) -> None:
    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        flat = torch.empty(shape, dtype=dtype)
        starts[name] = flat.data_ptr()
        return flat

    starts: dict[str, int] = {}
    step = StepBuffers(painter_of(engine).model.flux, reference, (3, 250, 25), torch.bfloat16, take, fast=True)
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
def test_odd_pictures_of_a_batch_equal_singles_in_fast() -> None:
    with load_flux_schnell("tiny", device="cuda", mode="fast") as engine:
        size = {"height": 80, "width": 80}
        together = engine.generate("a blue square", seed=1, batch_size=2, **size)
        for i in range(2):
            alone = engine.generate("a blue square", seed=1 + i, **size)
            assert (together[i] - alone[0]).abs().mean() < 0.02


def twins(n: int, k: int, *, bias: bool) -> tuple[NF4Linear, Linear]:
    """The same linear in NF4 and plain."""
    torch.manual_seed(0)
    weight = nf4.quantize(torch.randn(n, k))
    linear = NF4Linear(weight, torch.randn(n) if bias else None, ReferenceBackend())
    plain = Linear(k, n, bias=bias)
    plain.weight.data = nf4.dequantize(weight, torch.float32)
    plain.bias = None if linear.bias is None else nn.Parameter(linear.bias)
    return linear, plain.requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_multiply_fills_a_part_of_a_longer_buffer(batch: int, bias: bool) -> None:
    """As text and image write into one qkv buffer, from rows that are part of wider ones."""
    linear, plain = twins(24, 128, bias=bias)
    x = torch.randn(batch, 7, 192)[..., 64:]
    expected = plain(x)
    for module in (linear, plain):
        whole = torch.full((batch, 10, 24), torch.nan)
        multiply(module, ScaledTensor(x), whole[:, 2:9])
        torch.testing.assert_close(whole[:, 2:9], expected)
        assert whole[:, :2].isnan().all()
        assert whole[:, 9:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_parts_lie_apart_and_are_meant_side_by_side(device: str, batch: int, bias: bool) -> None:
    """As `linear1` writes q, k, v and the MLP, and `linear2` takes attention's output and the MLP."""
    wide, narrow = twins(24 + 64, 128, bias=bias), twins(24, 64 + 64, bias=bias)
    x, attn = torch.randn(2, batch, 10, 128, device=device)[:, :, 2:9]
    for linear1, linear2 in zip(wide, narrow, strict=True):
        linear1.to(device), linear2.to(device)
        first, last, y = (torch.full((batch, 7, n), torch.nan, device=device) for n in (24, 64, 24))
        multiply(linear1, ScaledTensor(x), [first, last], gelu=True)
        whole = linear1(x)
        torch.testing.assert_close(first, whole[..., :24], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, F.gelu(whole[..., 24:], approximate="tanh"), rtol=1e-4, atol=2**-10)
        multiply(linear2, [ScaledTensor(attn[..., 64:]), ScaledTensor(last)], y)
        torch.testing.assert_close(y, linear2(torch.cat((attn[..., 64:], last), dim=2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gelu_of_a_product_is_the_tanh_form(device: str, dtype: torch.dtype) -> None:
    """To one rounding, and the hardware's tanh, which is good to 2^-11. The forms are farthest apart about -2.7."""
    x = torch.cat((torch.linspace(-8, 8, 8192), torch.linspace(-3.2, -2.2, 8192))).view(128, 128).to(device, dtype)
    out, one = torch.full_like(x, torch.nan), torch.eye(128, device=device, dtype=dtype)
    product(x, None, one, None, torch.zeros_like(x[0]), out, gelu=True)
    tanh, erf = (F.gelu(x.double(), approximate=form) for form in ("tanh", "none"))
    torch.testing.assert_close(out.double(), tanh, rtol=torch.finfo(dtype).eps / 2, atol=2**-10)
    assert (out - tanh)[64:].abs().mean() < (out - erf)[64:].abs().mean() / 2


@pytest.mark.parametrize("batch", [1, 2])
def test_an_fp8_product_is_as_close_as_fp8_allows(batch: int) -> None:
    torch.manual_seed(0)
    weight = nf4.quantize(torch.randn(24, 128) * torch.logspace(-2, 2, 24)[:, None])
    linear = NF4Linear(weight, torch.randn(24), ReferenceBackend())
    linear.prepare_fp8()
    x = torch.randn(batch, 7, 128) * torch.logspace(-2, 2, 7)[:, None]
    operand = ScaledTensor(torch.empty(x.shape, dtype=FP8), torch.empty(x.shape[:2]))
    reference.quantize(x, operand)
    out = torch.full((batch, 7, 24), torch.nan)
    multiply(linear, operand, out)
    # both operands round to 3 bits, 2.6% each, in 128 terms that add up like noise: 0.3%, and four times that at worst
    length = x.norm(dim=-1)[..., None] * nf4.dequantize(weight, torch.float32).norm(dim=1)
    assert ((out - linear(x)).abs() / length).max() < 0.013


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 42, 43, 63, 64])
@pytest.mark.parametrize("width", [3072, 12288, 15360])
def test_an_fp8_product_of_few_rows(rows: int, width: int) -> None:
    """The smallest pictures have 16 tokens; cuBLASLt refused up to 42 with a bias."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, width, device="cuda").to(FP8) for n in (rows, 3072))
    scale, scales = (torch.rand(n, device="cuda") for n in (rows, 3072))
    bias = torch.randn(3072, device="cuda", dtype=torch.bfloat16)
    out = torch.full((rows, 3072), torch.nan, device="cuda", dtype=torch.bfloat16)
    product(x, scale, weight, scales, bias, out)
    expected = (x.float() * scale[:, None]) @ (weight.float() * scales[:, None]).t() + bias
    # the library sums in less than fp32: of all, 0.003 of their length; of one, 0.034 of what its sum spreads (H200)
    error, spread = (out.float() - expected).abs(), scale[:, None] * scales * width**0.5
    assert error.norm() < 0.005 * expected.norm()
    assert (error / (spread + bias.abs())).max() < 0.05


def denoised(engine: Engine, seed: int, prompt: str) -> Tensor:
    conditioning, img = engine.encode(prompt), sampling.pack(sampling.noise(seed, 1, 128, 128))
    txt, pe = painter_of(engine).model.transformer.txt_in(conditioning.txt), rope(engine, 128, 128)
    return sampling.denoise(painter_of(engine).model.transformer, img, txt, conditioning.modulation, pe)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("fp8_attention", [False, True])
def test_fast_is_nearer_to_exact_than_nf4_is_to_16_bits(
    engine: Engine, transformer: Transformer, fp8_attention: bool
) -> None:
    """Final latents within half of NF4's own distance to the unquantized model."""
    plain = load_flux_schnell("tiny", device="cpu", quantization="none")
    from_fast, from_nf4 = 0.0, 0.0
    for seed, prompt in enumerate(("a blue square", "a small green star above a large yellow ring", "two red circles")):
        transformer.use(reference, fast=False)
        exact = denoised(engine, seed, prompt)
        from_nf4 += float((exact - denoised(plain, seed, prompt)).norm())
        transformer.use(reference, fast=True, fp8_attention=fp8_attention)
        from_fast += float((denoised(engine, seed, prompt) - exact).norm())
    assert 0 < from_fast <= from_nf4 / 2


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@torch.inference_mode()
def test_a_fused_step_in_16_bits_is_as_near_to_32_as_the_reference_is(quantization: str) -> None:
    velocities = []
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)):
        with load_flux_schnell("tiny", device=device, dtype=dtype, quantization=quantization, mode="exact") as engine:
            assert painter_of(engine).model.transformer.fused == (device == "cuda")
            *tensors, pe = request(engine, 128, 80, 2)
            placed = (tensor.to(device, dtype) for tensor in tensors)
            velocity = painter_of(engine).model.transformer(*placed, tuple(table.to(device) for table in pe))
            velocities.append(velocity.float().cpu())
    exact, expected, ours = velocities
    assert 0 < (ours - exact).norm() < 1.25 * (expected - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_replayed_steps_are_the_launched_ones_bit_for_bit(mode: str) -> None:
    """Sizes, prompts and seeds take turns; then again without graphs, and after the weights were away."""
    jobs = [
        {"prompt": prompt, "seed": seed, "height": height, "width": width, "batch_size": batch}
        for seed, (height, width, batch) in enumerate([(128, 128, 1), (64, 96, 2), (256, 128, 1)])
        for prompt in ("a blue square", "two red circles")
    ]
    with load_flux_schnell("tiny", device="cuda", mode=mode) as engine:
        assert engine.mode == mode
        graphs, memory = painter_of(engine).memory.graphs, painter_of(engine).memory

        def drawn() -> list[Tensor]:
            return [engine.generate(**job) for job in jobs]

        largest = engine.generate("a ring", seed=0, height=256, width=256, batch_size=2)  # so that the block stays
        drawn()
        kept, place = dict(graphs._graphs), memory.arena.data_ptr()
        replayed = drawn()
        assert len(engine.captured) == 4
        assert memory.arena.data_ptr() == place
        assert dict(graphs._graphs) == kept  # nothing was captured again
        torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's graphs do, for the whole process
        filled = [torch.full((2**25,), torch.nan, device="cuda") for _ in range(3)]  # where they were
        assert all(map(torch.equal, drawn(), replayed))
        assert all(bool(tensor.isnan().all()) for tensor in filled)
        assert dict(graphs._graphs).items().isdisjoint(kept.items())
        del filled
        engine.offload()
        assert not engine.captured
        assert graphs.nbytes == 0
        assert all(map(torch.equal, drawn(), replayed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GraphCache, "_capture", lambda *arguments: None)
            graphs.clear()
            assert all(map(torch.equal, drawn(), replayed))
        assert torch.equal(engine.generate("a ring", seed=0, height=256, width=256, batch_size=2), largest)


@pytest.mark.gpu
def test_kernels_that_are_launched_early_draw_what_those_in_turn_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from vortex_core.kernels import launch
    from vortex_core.kernels.capabilities import card

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
@pytest.mark.parametrize("mode", ["exact", "fast"])
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


@pytest.mark.gpu
def test_a_captured_step_can_be_cancelled_between_steps() -> None:
    def stop(i: int, n: int, clean: Tensor) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with load_flux_schnell("tiny", device="cuda") as engine:
        engine.warmup()
        expected = engine.generate("a blue square", seed=1)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a blue square", seed=1, on_step=stop)
        assert torch.equal(engine.generate("a blue square", seed=1), expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*CUDA Graph is empty")
def test_blocks_that_stream_are_captured_in_parts_and_draw_the_same() -> None:
    jobs = [{"seed": seed, "height": side, "width": side} for seed, side in enumerate((128, 64, 128, 64))]

    def stop(i: int, n: int, clean: Tensor) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with load_flux_schnell("tiny", device="cuda") as engine:
        graphs = painter_of(engine).memory.graphs._graphs

        def drawn() -> list[Tensor]:
            return [engine.generate("a blue square", **job) for job in jobs]

        expected = drawn()
        asked = painter_of(engine).model.requirements(128, 128, 1, blas=painter_of(engine).memory.blas)
        painter_of(engine).memory.budget = smallest_budget(painter_of(engine).model.sizes, asked)
        assert all(map(torch.equal, drawn(), expected))
        steps, kept = painter_of(engine).memory.placement.steps, dict(graphs)
        assert len(kept) == 2
        assert len(steps.groups) > 1
        assert {len(recording._parts) for recording in kept.values()} == {4 * len(steps.groups) + 1}
        assert all(map(torch.equal, drawn(), expected))
        assert graphs == kept  # nothing was captured again
        engine.offload()
        assert not graphs
        assert all(map(torch.equal, drawn(), expected))
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a blue square", **jobs[0], on_step=stop)
        assert torch.equal(engine.generate("a blue square", **jobs[0]), expected[0])
