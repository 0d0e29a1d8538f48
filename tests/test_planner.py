"""The planner's promises, for any sizes and budgets."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from vortex_core.memory.arena import MIB, round_up
from vortex_core.memory.planner import (
    BLOCKS,
    GRAIN,
    PROMPT,
    SLACK,
    MemoryPlan,
    MemoryRequirements,
    StepRequirements,
    WeightGroupSize,
    cost,
    make_plan,
    placements,
    smallest_budget,
)

SIZES = st.integers(1, 300 * MIB)


@st.composite
def models(draw: st.DrawFn) -> tuple[WeightGroupSize, ...]:
    groups = [WeightGroupSize("embedders", "embedders", draw(SIZES)), WeightGroupSize("vae", "vae", draw(SIZES))]
    for part in PROMPT:
        groups += [
            WeightGroupSize(f"{part}.{i}", part, size) for i, size in enumerate(draw(st.lists(SIZES, max_size=4)))
        ]
    for kind in ("double_blocks", "single_blocks"):
        size = draw(SIZES)
        groups += [WeightGroupSize(f"{kind}.{i}", BLOCKS, size) for i in range(draw(st.integers(1, 6)))]
    return tuple(groups)


@st.composite
def requests(draw: st.DrawFn) -> MemoryRequirements:
    one, graph = draw(SIZES), draw(st.integers(0, 10**8))
    return MemoryRequirements(
        height=64,
        width=64,
        batch=4,
        scratch=draw(SIZES),
        steps=tuple(StepRequirements(n, n * one, n * graph, n * graph) for n in (4, 2, 1)),
        decode=draw(SIZES),
        rows=None,
        latents=draw(st.integers(0, 10**7)),
        library=draw(SIZES),
        blas=draw(SIZES),
    )


def asked(steps: tuple[tuple[int, int], ...] = ((1, 0),), **sizes: int) -> MemoryRequirements:
    batch = max(number for number, _ in steps)
    return MemoryRequirements(64, 64, batch, steps=tuple(StepRequirements(n, size) for n, size in steps), **sizes)


BUDGETS = st.integers(0, 12 * 10**9)


@given(models(), requests(), BUDGETS)
@settings(deadline=None)
def test_a_plan_fits_its_budget_and_is_missing_only_where_none_does(
    groups: tuple[WeightGroupSize, ...], request: MemoryRequirements, budget: int
) -> None:
    made = make_plan(groups, request, budget)
    least = smallest_budget(groups, request)
    if made is None:
        assert budget < least
        return
    assert least <= made.peak <= budget
    assert sum(made.breakdown.values()) == made.peak
    assert all(size >= 0 for size in made.breakdown.values())
    assert sum(group.nbytes for group in made.resident) + made.hosted == sum(group.nbytes for group in groups)
    assert {group.name for group in groups if group.part in ("embedders", "vae")}.isdisjoint(made.streamed)


@given(models(), requests(), BUDGETS)
@settings(deadline=None)
def test_claims_are_met_in_order(groups: tuple[WeightGroupSize, ...], request: MemoryRequirements, budget: int) -> None:
    made = make_plan(groups, request, budget)
    if made is None:
        return
    order = (BLOCKS, *PROMPT)
    streams = [any(p.name in made.streamed for p in groups if p.part == part) for part in order]
    for earlier, part in enumerate(order[:-1]):
        if streams[earlier]:  # then nothing of a later claim is resident
            later = [p for p in groups if p.part in order[earlier + 1 :]]
            assert all(p.name in made.streamed for p in later), part
    singles = {p.name for p in groups if p.name.startswith("single")} & made.streamed
    doubles = {p.name for p in groups if p.name.startswith("double")} & made.streamed
    sizes = {p.name.partition(".")[0]: p.nbytes for p in groups if p.part == BLOCKS}
    if sizes["single_blocks"] < sizes["double_blocks"] and doubles:
        assert len(singles) == sum(p.name.startswith("single") for p in groups)


@given(models(), requests(), BUDGETS, st.integers(0, 10**9))
@settings(deadline=None)
def test_more_budget_never_streams_more(
    groups: tuple[WeightGroupSize, ...], request: MemoryRequirements, budget: int, more: int
) -> None:
    made, richer = make_plan(groups, request, budget), make_plan(groups, request, budget + more)
    if made is not None:
        assert richer is not None
        assert richer.hosted <= made.hosted


@given(models(), requests(), BUDGETS)
@settings(deadline=None)
def test_weights_stay_where_they_are_if_they_can(
    groups: tuple[WeightGroupSize, ...], request: MemoryRequirements, budget: int
) -> None:
    for streamed in placements(groups):
        kept = make_plan(groups, request, budget, keep=streamed)
        blocks = any(group.part == BLOCKS and group.name in streamed for group in groups)
        if not blocks and MemoryPlan(groups, request, streamed, 1).peak <= budget:
            assert kept is not None
            assert kept.streamed == streamed
        if blocks and kept is not None:  # a smaller picture brings blocks back
            assert kept == make_plan(groups, request, budget)


def test_a_prompt_alone_moves_no_blocks() -> None:
    groups = tuple(WeightGroupSize(f"single_blocks.{i}", BLOCKS, 10 * MIB) for i in range(8))
    picture = asked(((1, 100 * MIB),))
    budget = MemoryPlan(groups, picture, frozenset(), 1).peak - 1
    made = make_plan(groups, picture, budget)
    assert made is not None
    assert made.streamed
    prompt = MemoryRequirements(0, 0, 0, library=MIB)
    assert make_plan(groups, prompt, budget, keep=made.streamed) == replace(made, requirements=prompt)
    richer = make_plan(groups, prompt, budget)
    assert richer is not None
    assert not richer.streamed


def test_slices_are_as_large_as_fits() -> None:
    groups = (WeightGroupSize("embedders", "embedders", MIB), WeightGroupSize("single_blocks.0", BLOCKS, 100 * MIB))
    request = asked(((4, 400 * MIB), (2, 200 * MIB), (1, 100 * MIB)))
    for step in request.steps:
        exactly = MemoryPlan(groups, request, frozenset(), step.pictures).peak
        made, less = make_plan(groups, request, exactly), make_plan(groups, request, exactly - 1)
        assert made is not None
        assert (made.slice, made.arena) == (step.pictures, step.buffers)
        assert less is None or less.slice < step.pictures or less.streamed
    assert make_plan(groups, replace(request, decode=10**9), 10**9) is None


def test_what_libraries_and_captured_steps_take_counts() -> None:
    groups = (WeightGroupSize("single_blocks.0", BLOCKS, 100 * MIB), WeightGroupSize("t5.0", "t5", 30 * MIB))
    steps = (StepRequirements(2, 40 * MIB, 12 * MIB, 8 * MIB), StepRequirements(1, 20 * MIB, 6 * MIB, 4 * MIB))
    request = MemoryRequirements(64, 64, 2, steps=steps, library=10 * MIB, blas=3 * MIB)
    plain = MemoryRequirements(64, 64, 2, steps=tuple(replace(step, library=0, graph=0) for step in steps))
    for streamed, number, added in (
        ((), 2, 12 + 8 + 3),
        (("t5.0",), 1, 10 + 4 + 3),
        (("t5.0", "single_blocks.0"), 2, 23),
    ):
        made = MemoryPlan(groups, request, frozenset(streamed), number)
        assert made.peak == MemoryPlan(groups, plain, frozenset(streamed), number).peak + added * MIB
        assert sum(made.breakdown.values()) == made.peak


def test_the_peak_is_a_sum_and_phases_share_the_arena() -> None:
    groups = (
        *(WeightGroupSize(f"single_blocks.{i}", BLOCKS, 50 * MIB) for i in range(3)),
        WeightGroupSize("t5.0", "t5", 30 * MIB),
    )
    request = MemoryRequirements(
        512, 512, 1, 12 * MIB, (StepRequirements(1, 20 * MIB),), decode=26 * MIB, rows=64, latents=MIB
    )
    none, some = frozenset[str](), frozenset({"single_blocks.0", "single_blocks.2", "t5.0"})
    pictures = round_up(512 * 512 * 13, GRAIN)
    assert MemoryPlan(groups, request, none, 1).peak == (150 + 30 + 34) * MIB + pictures + SLACK  # of 33 in the arena
    streaming = MemoryPlan(groups, request, some, 1)
    assert streaming.stages == {"prompt": 42 * MIB, "steps": 132 * MIB, "decode": 26 * MIB}
    assert streaming.peak == (50 + 134) * MIB + pictures + SLACK


def test_what_allocators_round_is_in_the_peak() -> None:
    groups = (WeightGroupSize("vae", "vae", 3 * MIB + 1), WeightGroupSize("single_blocks.0", BLOCKS, 1))
    assert MemoryPlan(groups, asked(), frozenset(), 1).peak == 4 * MIB + GRAIN + GRAIN + SLACK


def test_streamed_copies_hide_behind_what_computes_before_them() -> None:
    groups = (
        *(WeightGroupSize(f"single_blocks.{i}", BLOCKS, 10**8) for i in range(8)),
        WeightGroupSize("t5.0", "t5", 10**9),
    )

    def told(streamed: set[int], step_ms: float = 0.0, batch: int = 1) -> tuple[float, float]:
        names = frozenset({"t5.0", *(f"single_blocks.{i}" for i in streamed)})
        request = MemoryRequirements(64, 64, batch)
        return cost(MemoryPlan(groups, request, names, 1), rate=10e9, steps=4, step_ms=step_ms)

    every = set(range(8))
    assert told(every) == (100, 4 * 80)  # 10 ms a copy, and none hides
    assert told(every, batch=3) == told(every)
    assert told(every, step_ms=40)[1] == 4 * 8 * (10 - 5)
    assert told(every, step_ms=80)[1] == 0
    assert told({1, 3, 5, 7}, step_ms=40)[1] == 0  # each hides behind two blocks
    assert told({0, 1, 4}, step_ms=32)[1] == 4 * (10 - 4)  # 1 alone has too little before it
    assert told({2, 3})[1] == 20  # once a picture: each keeps a buffer
    assert told(set())[1] == 0


@given(models(), BUDGETS, st.floats(0, 100))
@settings(deadline=None)
def test_streaming_costs_at_most_its_copies(groups: tuple[WeightGroupSize, ...], budget: int, step_ms: float) -> None:
    made = make_plan(groups, asked(), budget)
    if made is not None:
        copies = sum(p.nbytes for p in groups if p.part == BLOCKS and p.name in made.streamed) / 1e9 * 1e3
        assert 0 <= cost(made, 1e9, 4, step_ms)[1] <= cost(made, 1e9, 4)[1] <= 4 * copies + 1e-6
