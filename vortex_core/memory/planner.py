"""Who gets the VRAM: a pure function from sizes and a budget to a placement. No device, no tensor, no model.

Weights are cut into groups, each resident or streamed from host memory. Placements are tried from the richest to the
poorest, in order of claim: T5 gives way first, then CLIP, modulation, and step-time blocks one by one; the first
whose peak fits the budget is the plan. The peak is a sum: weights, the arena (memory/arena.py), what libraries allocate
by themselves, cuBLAS' workspaces, captured steps, the finished pictures. All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .arena import MIB, round_up

ALWAYS = ("embedders", "vae")  # parts that never stream: small, and used in every picture
BLOCKS = "blocks"
PROMPT = ("modulation", "clip", "t5")  # parts of prompt time, the last to give way first
GRAIN = 2 * MIB  # what every allocator of torch rounds large tensors up to, at most
SLACK = 48 * MIB  # what allocators round besides and keep of earlier calls: no tensor of ours


@dataclass(frozen=True, slots=True)
class WeightGroupSize:
    """Weights that live in one place. `name` such as `single_blocks.7`; `part` one of the names above."""

    name: str
    part: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class StepRequirements:
    """What steps of so many `pictures` at once take: their `buffers` in the arena, what the `library`'s attention
    allocates in one, and what a captured one keeps for that (`graph`).
    """

    pictures: int
    buffers: int = 0
    library: int = 0
    graph: int = 0


@dataclass(frozen=True, slots=True)
class MemoryRequirements:
    """What one request takes besides weights.

    In the arena: `scratch` for decoded weights, `steps` (for each number of pictures that may be drawn at once, the
    largest first), `decode` for the VAE, in strips of `rows`, and `latents` of the whole batch. Outside: `library`,
    what text encoders and decoder have libraries allocate, `blas`, cuBLAS' workspaces, and `slack` that is no tensor of
    ours.
    """

    height: int
    width: int
    batch: int
    scratch: int = 0
    steps: tuple[StepRequirements, ...] = (StepRequirements(1),)
    decode: int = 0
    rows: int | None = None
    latents: int = 0
    library: int = 0
    blas: int = 0
    slack: int = SLACK

    @property
    def pictures(self) -> int:
        """Bytes of what is handed out: the finished pictures, fp32, and to `on_step` latents, a twelfth of that."""
        return self.batch * self.height * self.width * (3 * 4 + 1)


@dataclass(frozen=True)  # without slots: what follows is computed once
class MemoryPlan:
    """Which groups stream, how many pictures are drawn at once (`slice`), and the peak that follows."""

    groups: tuple[WeightGroupSize, ...]
    requirements: MemoryRequirements
    streamed: frozenset[str]
    slice: int

    @property
    def resident(self) -> tuple[WeightGroupSize, ...]:
        """The groups that stay on the device."""
        return tuple(group for group in self.groups if group.name not in self.streamed)

    @property
    def step(self) -> StepRequirements:
        """What steps of one slice take."""
        return next(step for step in self.requirements.steps if step.pictures == self.slice)

    @property
    def stages(self) -> dict[str, int]:
        """What each phase lays out in the arena, from its start."""
        scratch = self.requirements.scratch
        return {
            "prompt": scratch + self.staging(*PROMPT),
            "steps": scratch + self.staging(BLOCKS) + self.step.buffers,
            "decode": self.requirements.decode,
        }

    def staging(self, *parts: str) -> int:
        """The pair of buffers through which the streamed groups of these parts pass."""
        sizes = [group.nbytes for group in self.groups if group.name in self.streamed and group.part in parts]
        return min(2, len(sizes)) * max(sizes, default=0)

    @cached_property
    def arena(self) -> int:
        """The one block that all phases work in; latents lie at its end."""
        return round_up(max(self.stages.values()) + self.requirements.latents, GRAIN)

    @cached_property
    def library(self) -> int:
        """What libraries allocate by themselves, at most: phases take turns."""
        return round_up(max(self.requirements.library, self.step.library), GRAIN)

    @cached_property
    def peak(self) -> int:
        """The most that torch, and the driver for captured steps, will have reserved."""
        weights = sum(round_up(group.nbytes, GRAIN) for group in self.resident)
        held = self.requirements.blas + self.arena + self.library + self.step.graph
        return weights + held + round_up(self.requirements.pictures, GRAIN) + self.requirements.slack

    @property
    def breakdown(self) -> dict[str, int]:
        """The peak by component; adds up to it."""
        parts = dict.fromkeys((BLOCKS, *ALWAYS, *PROMPT), 0)
        for group in self.resident:
            parts[group.part] += group.nbytes
        parts |= {"arena": self.arena, "libraries": self.library, "cuBLAS": self.requirements.blas}
        parts |= {"graphs": self.step.graph, "pictures": self.requirements.pictures}
        return parts | {"rounding and slack": self.peak - sum(parts.values())}

    @property
    def hosted(self) -> int:
        """Bytes of pinned host memory that the streamed groups take."""
        return sum(group.nbytes for group in self.groups if group.name in self.streamed)


@lru_cache(maxsize=64)  # every picture asks
def make_plan(
    groups: tuple[WeightGroupSize, ...],
    requirements: MemoryRequirements,
    budget: float,
    keep: frozenset[str] | None = None,
) -> MemoryPlan | None:
    """The richest placement whose peak fits `budget`, or None where not even the poorest does.

    `keep` is what streams now: that placement stays if it fits and all its blocks are resident, or the request has no
    steps, since moving weights costs more than it brings. Then as many pictures at once as still fit.
    """
    candidates = placements(groups)
    steps = any(step.buffers for step in requirements.steps)
    if keep is not None and not (steps and any(group.part == BLOCKS and group.name in keep for group in groups)):
        candidates = [keep, *candidates]
    for streamed in candidates:
        plans = [MemoryPlan(groups, requirements, streamed, step.pictures) for step in requirements.steps]
        if plans[-1].peak <= budget:
            return next(plan for plan in plans if plan.peak <= budget)
    return None


def smallest_budget(groups: Sequence[WeightGroupSize], requirements: MemoryRequirements) -> int:
    """The smallest budget that `make_plan` has a plan for."""
    last = requirements.steps[-1].pictures
    return min(MemoryPlan(tuple(groups), requirements, streamed, last).peak for streamed in placements(groups))


def placements(groups: Sequence[WeightGroupSize]) -> list[frozenset[str]]:
    """Every set of streamed groups that is tried, from the richest placement to the poorest."""
    streamed: frozenset[str] = frozenset()
    tried = [streamed]
    for part in reversed(PROMPT):
        streamed |= {group.name for group in groups if group.part == part}
        tried.append(streamed)
    kinds: dict[str, list[WeightGroupSize]] = {}
    for group in groups:
        if group.part == BLOCKS:
            kinds.setdefault(group.name.partition(".")[0], []).append(group)
    # the smaller kind first: its staging buffers are smaller, too
    for kind in sorted(kinds.values(), key=lambda kind: max(group.nbytes for group in kind)):
        for n in range(1, len(kind) + 1):
            # evenly apart, so that each one's copy has the others' time to hide behind
            tried.append(streamed | {kind[(2 * i + 1) * len(kind) // (2 * n)].name for i in range(n)})
        streamed = tried[-1]
    return tried


def cost(plan: MemoryPlan, rate: float, steps: int, step_ms: float = 0.0) -> tuple[float, float]:
    """Milliseconds that streaming adds to each new prompt, and to each picture, at `rate` bytes a second to the device.

    `step_ms` is what a step of one slice takes with everything resident. A streamed block's copy hides behind what
    computes since the one before it; without `step_ms` none does, and the result is an upper bound. Encoders are taken
    as copies alone: their products take less than their copies.
    """
    prompt = sum(group.nbytes for group in plan.groups if group.name in plan.streamed and group.part in PROMPT)
    blocks = [group for group in plan.groups if group.part == BLOCKS]
    total = sum(group.nbytes for group in blocks) or 1
    streamed = [i for i, group in enumerate(blocks) if group.name in plan.streamed]
    added = 0.0
    for before, i in zip([k - len(blocks) for k in streamed[-1:]] + streamed, streamed, strict=False):
        between = sum(blocks[k].nbytes for k in range(before, i)) * step_ms / total  # rounds follow each other
        added += max(0.0, blocks[i].nbytes / rate * 1e3 - between)
    rounds = steps if len(streamed) > 2 else 1  # two stay in their buffers
    slices = -(-plan.requirements.batch // plan.slice)
    return prompt / rate * 1e3, slices * rounds * added / max(1, plan.requirements.batch)
