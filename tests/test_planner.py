"""The planner's promises, for any sizes and budgets; and the arithmetic of torch's allocator that they rest on."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vortex_core.allocator import MIB, block_for, reserved, segment
from vortex_core.planner import (
    BLOCKS,
    PROMPT,
    SLACK,
    Demand,
    Piece,
    Plan,
    cost,
    placements,
    plan,
    smallest_budget,
    stream_ms,
)

SIZES = st.integers(1, 300 * MIB)


@st.composite
def models(draw: st.DrawFn) -> tuple[Piece, ...]:
    pieces = [Piece("embedders", "embedders", draw(SIZES)), Piece("vae", "vae", draw(SIZES))]
    for group in PROMPT:
        pieces += [Piece(f"{group}.{i}", group, size) for i, size in enumerate(draw(st.lists(SIZES, max_size=4)))]
    for kind in ("double_blocks", "single_blocks"):
        size = draw(SIZES)
        pieces += [Piece(f"{kind}.{i}", BLOCKS, size) for i in range(draw(st.integers(1, 6)))]
    return tuple(pieces)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    one = draw(SIZES)
    return Demand(
        height=64,
        width=64,
        batch=4,
        prompt=draw(SIZES),
        steps=((4, 4 * one), (2, 2 * one), (1, one)),
        decode=draw(SIZES),
        rows=None,
        latents=draw(st.integers(0, 10**7)),
        fixed=tuple(draw(st.lists(SIZES, max_size=3))),
    )


BUDGETS = st.integers(0, 12 * 10**9)


@given(models(), demands(), BUDGETS)
@settings(deadline=None)
def test_a_plan_fits_its_budget_and_is_missing_only_where_none_does(
    pieces: tuple[Piece, ...], demand: Demand, budget: int
) -> None:
    made = plan(pieces, demand, budget)
    least = smallest_budget(pieces, demand)
    if made is None:
        assert budget < least
        return
    assert least <= made.peak <= budget
    assert sum(made.breakdown.values()) == made.peak
    assert all(size >= 0 for size in made.breakdown.values())
    assert sum(piece.nbytes for piece in made.resident) + made.hosted == sum(piece.nbytes for piece in pieces)
    assert {piece.name for piece in pieces if piece.group in ("embedders", "vae")}.isdisjoint(made.streamed)


@given(models(), demands(), BUDGETS)
@settings(deadline=None)
def test_claims_are_met_in_order(pieces: tuple[Piece, ...], demand: Demand, budget: int) -> None:
    made = plan(pieces, demand, budget)
    if made is None:
        return
    order = (BLOCKS, *PROMPT)
    streams = [any(p.name in made.streamed for p in pieces if p.group == group) for group in order]
    for earlier, group in enumerate(order[:-1]):
        if streams[earlier]:  # then nothing of a later claim is resident
            later = [p for p in pieces if p.group in order[earlier + 1 :]]
            assert all(p.name in made.streamed for p in later), group
    singles = {p.name for p in pieces if p.name.startswith("single")} & made.streamed
    doubles = {p.name for p in pieces if p.name.startswith("double")} & made.streamed
    sizes = {p.name.partition(".")[0]: p.nbytes for p in pieces if p.group == BLOCKS}
    if sizes["single_blocks"] < sizes["double_blocks"] and doubles:
        assert len(singles) == sum(p.name.startswith("single") for p in pieces)


@given(models(), demands(), BUDGETS, st.integers(0, 10**9))
@settings(deadline=None)
def test_more_budget_never_streams_more(pieces: tuple[Piece, ...], demand: Demand, budget: int, more: int) -> None:
    made, richer = plan(pieces, demand, budget), plan(pieces, demand, budget + more)
    if made is not None:
        assert richer is not None
        assert richer.hosted <= made.hosted


@given(models(), demands(), BUDGETS)
@settings(deadline=None)
def test_weights_stay_where_they_are_if_they_can(pieces: tuple[Piece, ...], demand: Demand, budget: int) -> None:
    for streamed in placements(pieces):
        kept = plan(pieces, demand, budget, keep=streamed)
        blocks = any(piece.group == BLOCKS and piece.name in streamed for piece in pieces)
        if not blocks and Plan(pieces, demand, streamed, 1).peak <= budget:
            assert kept is not None
            assert kept.streamed == streamed
        if blocks and kept is not None:  # a smaller picture brings blocks back
            assert kept == plan(pieces, demand, budget)


def test_a_prompt_alone_moves_no_blocks() -> None:
    pieces = tuple(Piece(f"single_blocks.{i}", BLOCKS, 10 * MIB) for i in range(8))
    picture = Demand(64, 64, 1, 0, ((1, 100 * MIB),), 0, None)
    budget = Plan(pieces, picture, frozenset(), 1).peak - 1
    made = plan(pieces, picture, budget)
    assert made is not None
    assert made.streamed
    prompt = Demand(0, 0, 0, MIB, ((1, 0),), 0, None)
    assert plan(pieces, prompt, budget, keep=made.streamed) == replace(made, demand=prompt)
    richer = plan(pieces, prompt, budget)
    assert richer is not None
    assert not richer.streamed


def test_slices_are_as_large_as_fits() -> None:
    pieces = (Piece("embedders", "embedders", MIB), Piece("single_blocks.0", BLOCKS, 100 * MIB))
    demand = Demand(64, 64, 4, 0, ((4, 400 * MIB), (2, 200 * MIB), (1, 100 * MIB)), 0, None)
    for number, size in demand.steps:
        exactly = Plan(pieces, demand, frozenset(), number).peak
        made, less = plan(pieces, demand, exactly), plan(pieces, demand, exactly - 1)
        assert made is not None
        assert (made.slice, made.workspace) == (number, size)
        assert less is None or less.slice < number or less.streamed
    assert plan(pieces, replace(demand, decode=10**9), 10**9) is None


def test_captured_steps_count() -> None:
    pieces = (Piece("single_blocks.0", BLOCKS, 100 * MIB), Piece("t5.0", "t5", 30 * MIB))
    demand = Demand(64, 64, 2, 0, ((2, 40 * MIB), (1, 20 * MIB)), 0, None, graphs=((2, 8 * MIB), (1, 4 * MIB)))
    plain = replace(demand, graphs=())
    for streamed, number, kept in (((), 2, 8), (("t5.0",), 1, 4), (("t5.0", "single_blocks.0"), 2, 8)):
        made = Plan(pieces, demand, frozenset(streamed), number)
        assert made.graphs == kept * MIB
        assert made.peak == Plan(pieces, plain, frozenset(streamed), number).peak + kept * MIB
        assert sum(made.breakdown.values()) == made.peak


def test_the_peak_is_what_is_resident_and_the_largest_stage() -> None:
    pieces = (*(Piece(f"single_blocks.{i}", BLOCKS, 50 * MIB) for i in range(3)), Piece("t5.0", "t5", 30 * MIB))
    demand = Demand(512, 512, 1, 10 * MIB, ((1, 20 * MIB),), 26 * MIB, 64, fixed=(32 * MIB,))
    none, some = frozenset[str](), frozenset({"single_blocks.0", "single_blocks.2", "t5.0"})
    assert Plan(pieces, demand, none, 1).peak == (32 + 150 + 30 + 26) * MIB + segment(512 * 512 * 12) + SLACK
    assert Plan(pieces, demand, some, 1).stages == {"prompt": 40 * MIB, "steps": 120 * MIB, "decode": 26 * MIB}
    assert Plan(pieces, demand, some, 1).peak == (32 + 50 + 120) * MIB + segment(512 * 512 * 12) + SLACK


def test_streamed_copies_hide_behind_the_others() -> None:
    assert stream_ms([0, 0, 0], [2, 2, 2], rounds=4) == 24
    assert stream_ms([3, 0], [1, 5], rounds=4) == 3 + 24  # one buffer holds it after the first time
    alternating = stream_ms([4, 0] * 4, [1, 9] * 4, rounds=4)
    assert alternating == 4 + 160  # every copy but the first hides
    assert stream_ms([10] * 4, [1] * 4, rounds=2) == pytest.approx(8 * 10 + 1, abs=10)  # bound by copies
    pieces = (*(Piece(f"single_blocks.{i}", BLOCKS, 10**8) for i in range(4)), Piece("t5.0", "t5", 10**9))
    demand = Demand(64, 64, 1, 0, ((1, 0),), 0, None)
    streamed = Plan(pieces, demand, frozenset(piece.name for piece in pieces), 1)
    assert cost(streamed, rate=10e9, steps=4) == cost(replace(streamed, demand=replace(demand, batch=1)), 10e9, 4)
    assert cost(streamed, rate=10e9, steps=4).prompt == pytest.approx(100)
    assert 150 <= cost(streamed, rate=10e9, steps=4).picture <= 160
    assert cost(streamed, rate=10e9, steps=4, step_ms=400).picture < 15
    assert cost(Plan(pieces, demand, frozenset(), 1), rate=10e9, steps=4).picture == 0


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 9)), min_size=1, max_size=8), st.integers(1, 4))
@settings(deadline=None)
def test_streaming_takes_no_less_than_its_parts(units: list[tuple[float, float]], rounds: int) -> None:
    copies, computes = zip(*units, strict=True)
    time, compute = stream_ms(copies, computes, rounds), rounds * sum(computes)
    assert compute <= time + 1e-6
    assert time <= compute + rounds * sum(copies) + 1e-6


def test_segments_are_torchs() -> None:
    assert [segment(size) for size in (1, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 10 * MIB + 1)] == [
        2 * MIB, 2 * MIB, 20 * MIB, 20 * MIB, 10 * MIB, 12 * MIB,
    ]  # fmt: skip
    assert (
        reserved(
            (
                MIB,
                MIB,
                1,
            )
        )
        == 4 * MIB
    )
    assert (
        reserved(
            (
                6 * MIB,
                6 * MIB,
                6 * MIB,
            )
        )
        == 20 * MIB
    )
    assert (
        reserved(
            (
                15 * MIB,
                MIB + 512,
            )
        )
        == 16 * MIB + 20 * MIB
    )  # a rest of a MiB is no block
    assert (
        reserved(
            (
                14 * MIB + 512,
                1 * MIB + 512,
            )
        )
        == 16 * MIB
    )  # a larger one is


@given(st.lists(st.integers(1, 100 * MIB), max_size=12))
def test_what_is_reserved_holds_what_is_allocated(sizes: list[int]) -> None:
    assert sum(sizes) <= reserved(tuple(sizes))
    assert reserved(tuple(sizes)) >= reserved(tuple(sizes[:-1]))


def test_a_hole_too_small_costs_room() -> None:
    a, b, c = (1, 40 * MIB), (2, 2 * MIB), (3, 50 * MIB)
    assert block_for([a, b, (1, 0), (2, 0), c]) == 50 * MIB
    assert block_for([a, b, (1, 0), c]) == 92 * MIB  # b lies in the middle, so c does not fit into a's place
    assert block_for([(1, 100)]) == 4 * MIB  # small requests have segments of their own


@given(st.lists(st.integers(MIB + 1, 60 * MIB), min_size=1, max_size=8), st.data())
def test_a_block_is_no_smaller_than_what_lives_in_it(sizes: list[int], data: st.DataObject) -> None:
    events, live, most = [], {}, 0
    for number, size in enumerate(sizes):
        events.append((number, size))
        live[number] = size
        most = max(most, sum(live.values()))
        for gone in data.draw(st.sets(st.sampled_from(sorted(live)))):
            events.append((gone, 0))
            del live[gone]
    block = block_for(events)
    assert most <= block
    assert block <= sum(sizes) + (len(sizes) + 2) * 2 * MIB + block // 50
