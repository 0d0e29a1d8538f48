"""Blocks that stay decoded to 8 bits where the budget has room: which, how they move, and the same pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_parts import painter_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Linear

from vortex_core import Engine, load_flux_schnell, nf4
from vortex_core.kernels import ScaledTensor, reference
from vortex_core.memory import planner
from vortex_core.memory.arena import MIB, round_up
from vortex_core.memory.host_memory import HostMemory
from vortex_core.memory.offload import WeightGroup
from vortex_core.memory.planner import BLOCKS, GRAIN, MemoryRequirements, WeightGroupSize, make_plan, smallest_budget
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.quant.linear import NF4Linear, multiply
from vortex_core.quant.precision import EXACT, Fp8, Int8, Precision

pytestmark = pytest.mark.usefixtures("seeded")

CPU = torch.device("cpu")
GB = 1e9
SIZE = {"height": 64, "width": 96, "steps": 2}
REQUEST = MemoryRequirements(64, 64, 1, scratch=MIB)


def blocks(count: int, packed: int = 9 * MIB, copied: int = 16 * MIB, kind: str = "single") -> list[WeightGroupSize]:
    return [WeightGroupSize(f"{kind}_blocks.{i}", BLOCKS, packed, copied) for i in range(count)]


GROUPS = (
    WeightGroupSize("vae", "vae", MIB),
    *blocks(2, 18 * MIB, 32 * MIB, "double"),
    *blocks(4),
    WeightGroupSize("t5.0", "t5", 30 * MIB),
)


@given(st.integers(0, 400 * MIB), st.integers(0, 100 * MIB))
@settings(deadline=None)
def test_copies_take_what_is_left_and_never_more(budget: int, more: int) -> None:
    plan, richer = make_plan(GROUPS, REQUEST, budget), make_plan(GROUPS, REQUEST, budget + more)
    if plan is None:
        return
    assert richer is not None
    assert plan.peak <= budget
    assert sum(plan.breakdown.values()) == plan.peak
    assert plan.copies <= {group.name for group in GROUPS if group.copied}
    assert plan.copies <= richer.copies
    if plan.streamed:
        assert not plan.copies
    else:  # one more would not fit
        left = [group for group in GROUPS if group.copied and group.name not in plan.copies]
        extra = [round_up(group.copied, GRAIN) - round_up(group.nbytes, GRAIN) for group in left]
        assert plan.peak + min(extra, default=budget) > budget or not extra


def test_the_smaller_kind_is_copied_first_and_what_it_saves_is_known() -> None:
    packed = make_plan(GROUPS, REQUEST, smallest_budget(GROUPS, REQUEST) + 200 * MIB)
    assert packed is not None
    least = make_plan(GROUPS, REQUEST, 10**12)
    assert least is not None
    assert least.copies == {group.name for group in GROUPS if group.part == BLOCKS}
    assert least.kept == 2 * 18 * MIB + 4 * 9 * MIB
    assert least.hosted == 0
    whole = least.peak
    some = make_plan(GROUPS, REQUEST, whole - 1)
    assert some is not None
    assert {name.partition(".")[0] for name in least.copies - some.copies} == {"double_blocks"}
    # a copy of 16 MiB is of 16 Mi values: 9 MiB read and 16 MiB written in each step
    assert some.saved == (4 * 25 + (len(some.copies) - 4) * 50) * MIB


def test_copies_stay_where_they_are_if_they_fit_and_none_is_added() -> None:
    all_of_them = make_plan(GROUPS, REQUEST, 10**12)
    assert all_of_them is not None
    nothing, some = frozenset[str](), frozenset({"single_blocks.1"})
    for copies in (nothing, some, all_of_them.copies):
        kept = make_plan(GROUPS, REQUEST, 10**12, nothing, copies)
        assert kept is not None
        assert kept.copies == copies
    tight = make_plan(GROUPS, REQUEST, all_of_them.peak - 30 * MIB, nothing, all_of_them.copies)
    assert tight is not None
    assert nothing < tight.copies < all_of_them.copies


def group_of(precision: Precision) -> tuple[WeightGroup, nn.Sequential]:
    module = nn.Sequential(Linear(256, 128), nn.LayerNorm(128), Linear(128, 64))
    for name in ("0", "2"):
        plain = module.get_submodule(name)
        assert isinstance(plain, Linear)
        weight = nf4.quantize(torch.randn(plain.weight.shape))
        linear = NF4Linear(weight, torch.randn(len(weight.packed)), ReferenceBackend())
        linear.use(precision)
        module.set_submodule(name, linear)
    group = WeightGroup("group", "blocks", module)
    group.settle(device=torch.empty(group.measure(), dtype=torch.uint8))
    return group, module


def products(module: nn.Sequential) -> list[Tensor]:
    found = []
    for linear in (module[0], module[2]):
        assert isinstance(linear, NF4Linear)
        (n, k), dtype = linear.shape, linear.precision.operand
        assert dtype is not None
        x = ScaledTensor(torch.empty(1, 5, k, dtype=dtype), torch.empty(1, 5))
        reference.quantize(torch.linspace(-1, 1, 5 * k).view(1, 5, k), x)
        found.append(torch.full((1, 5, n), torch.nan))
        multiply(linear, x, found[-1])
    return found


def storages(module: nn.Module) -> dict[str, int]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors}


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


@pytest.mark.parametrize("precision", [Fp8(), Int8()], ids=str)
def test_a_group_goes_all_ways_and_computes_the_same_bits(precision: Precision) -> None:
    group, module = group_of(precision)
    expected, state = products(module), {name: t.clone() for name, t in module.state_dict().items()}
    assert group.copied > group.nbytes == group.held
    memory = HostMemory(group.nbytes, pin=False)
    for way in ("expand", "host", "expand", "device", "expand", "stream", "expand", "stream", "device"):
        if way == "expand":
            group.expand(CPU)
            assert group.device is not None
            assert group.host is not None
            assert len(group.device) == group.copied == group.held
            where = storages(module)
            device, host = (buffer.untyped_storage().data_ptr() for buffer in (group.device, group.host))
            for name, pointer in where.items():
                assert pointer == (host if name.endswith(("packed", "absmax")) else device), name
            there = group.host.clone()
            group.host.fill_(0)
            assert equal(products(module), expected)  # a product needs nothing of it
            group.host.copy_(there)
        elif way == "device":
            group.to_device(CPU)
        else:
            group.to_host(memory if way == "stream" else None)
        assert group.expanded == (way == "expand")
        assert equal(products(module), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert group.held == group.nbytes


def test_what_does_not_fit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    group, module = group_of(Int8())
    expected, before = products(module), storages(module)
    empty = torch.empty

    def full(*arguments: object, **options: object) -> Tensor:
        if arguments == (group.copied,):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        group.expand(CPU)
    assert (group.expanded, storages(module)) == (False, before)
    assert equal(products(module), expected)


def test_in_16_bits_there_are_no_copies() -> None:
    group, module = group_of(EXACT)
    assert group.copied == 0
    assert WeightGroup("vae", "vae", nn.Conv2d(4, 4, 3)).copied == 0
    assert isinstance(module[0], NF4Linear)
    assert module[0].decoded is None


@pytest.fixture(scope="module", params=["int8", "fp8"])
def engine_in_8_bits(request: pytest.FixtureRequest, tiny_dir: Path) -> Iterator[Engine]:
    with load_flux_schnell(tiny_dir, device="cpu", mode=request.param, vram_budget=2) as engine:
        yield engine


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Sizes are rounded to this instead of MiB: the miniature's blocks are smaller than that."""
    make_plan.cache_clear()
    monkeypatch.setattr(planner, "GRAIN", 2**12)
    yield 2**12
    make_plan.cache_clear()


def copied(engine: Engine) -> frozenset[str]:
    """The groups that are resident as copies, by the plan and by where they are."""
    there = frozenset(group.name for group in painter_of(engine).model.groups if group.expanded)
    assert engine.plan.copies == there
    return there


def test_a_budget_buys_copies_and_pictures_stay_bit_for_bit(engine_in_8_bits: Engine, fine: int) -> None:
    engine = engine_in_8_bits
    engine.limit(1.9)
    engine.generate("a green ring", seed=1, **SIZE)
    blocks = [group for group in engine.plan.groups if group.part == BLOCKS]
    assert copied(engine) == {group.name for group in blocks}
    expected = engine.generate("a green ring", seed=1, **SIZE)
    rows = painter_of(engine).memory.components
    assert rows["blocks"] == sum(group.copied for group in blocks)
    plan = engine.plan
    whole, least = plan.peak, smallest_budget(plan.groups, plan.requirements)
    counts = set()
    for budget in (*range(whole, least, -(2**19)), least, whole, whole - fine):
        engine.limit(budget / GB)
        assert torch.equal(engine.generate("a green ring", seed=1, **SIZE), expected)
        assert engine.plan.peak <= budget
        planned = make_plan(plan.groups, plan.requirements, engine.budget)
        assert planned is not None
        assert copied(engine) == planned.copies
        counts.add(len(planned.copies))
    assert {0, len(blocks)} < counts
    engine.limit(2)
    painter_of(engine).memory.offload()
    assert not any(group.expanded for group in painter_of(engine).model.groups)
    engine.resume()
    assert copied(engine) == {group.name for group in blocks}
    assert torch.equal(engine.generate("a green ring", seed=1, **SIZE), expected)


def test_a_larger_picture_takes_room_from_copies_and_they_do_not_come_and_go(
    engine_in_8_bits: Engine, fine: int
) -> None:
    engine, large = engine_in_8_bits, {**SIZE, "height": 512, "width": 512, "steps": 1}
    engine.limit(2)
    engine.generate("a green ring", seed=1, **large)
    everything = copied(engine)
    engine.limit((engine.plan.peak - 2**19) / GB)
    engine.generate("a green ring", seed=1, **SIZE)
    assert copied(engine) == everything
    engine.generate("a green ring", seed=1, **large)
    fewer = copied(engine)
    assert fewer < everything
    engine.generate("a green ring", seed=1, **SIZE)
    assert copied(engine) == fewer
    engine.limit(2)
    engine.generate("a green ring", seed=1, **SIZE)
    assert copied(engine) == everything


def test_exact_has_no_copies_whatever_the_budget(engine: Engine) -> None:
    assert not engine.plan.copies
    assert engine.plan.kept == engine.plan.saved == 0
