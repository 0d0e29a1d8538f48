"""What stays in VRAM and what streams: a pure function of sizes and a budget. No device, no tensor, no model.

Weights are cut into groups, each resident or streamed from host memory. Placements are tried from the richest to the
poorest: first T5 streams, then CLIP, modulation, and step-time blocks one by one. The first whose peak fits the budget
is the plan. Where nothing streams and there is room left, blocks stay decoded to 8 bits in place of their packed
weights, as many as fit: that saves decoding them in each step. The peak is a sum: weights, the arena (memory/arena.py),
what libraries allocate by themselves, cuBLAS' workspaces, captured steps, the finished pictures. All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from .arena import MIB, round_up

ALWAYS = ("embedders", "vae")  # parts that never stream: small, and used in every picture
BLOCKS = "blocks"
PROMPT = ("modulation", "clip", "t5")  # parts of prompt time; the last streams first
GRAIN = 2 * MIB  # torch's allocators round large tensors up to this at most
SLACK = 48 * MIB  # what allocators round further, and keep of earlier calls
DECODED = 25 / 7  # bytes that decoding moves in each step, for each byte that a copy takes more: 9/16 + 1 over 1 - 9/16


@dataclass(frozen=True, slots=True)
class WeightGroupSize:
    """The size of a weight group: `name` such as `single_blocks.7`, `part` one of the names above.

    `copied`: with its weights decoded to 8 bits; 0 where they cannot be.
    """

    name: str
    part: str
    nbytes: int
    copied: int = 0


@dataclass(frozen=True, slots=True)
class StepRequirements:
    """What a step of `pictures` at once takes: `buffers` in the arena, what the `library`'s attention allocates, and
    what a captured step keeps for that (`graph`).
    """

    pictures: int
    buffers: int = 0
    library: int = 0
    graph: int = 0


@dataclass(frozen=True, slots=True)
class MemoryRequirements:
    """What one request takes besides weights.

    In the arena: `scratch` for dequantized weights; `encode` for the VAE's encoder, with its weights; `steps`, for each
    number of pictures that may be drawn at once, the largest first; `decode` for the VAE's decoder; both in strips of
    `rows`; `latents` of the whole batch. Outside: `library`, what
    libraries allocate for text encoders and decoder; `blas`, cuBLAS' workspaces; `slack` for what is no tensor of ours.
    `more`: how many tensors of the latents' size there are besides the usual three, and `given`: a caller's pictures.
    `packed`: weights are asked for as they are, so that none may be resident as a copy.
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
    more: int = 0
    given: int = 0
    packed: bool = False
    encode: int = 0

    @property
    def pictures(self) -> int:
        """Bytes that callers get: the finished pictures, fp32, and for `on_step` the latents, a twelfth of that; and
        those of pictures that they give.
        """
        return self.batch * self.height * self.width * (3 * 4 + 1) + self.given


@dataclass(frozen=True)  # without slots: what follows is computed once
class MemoryPlan:
    """Which groups stream, how many pictures are drawn at once (`slice`), which groups are resident as `copies` in 8
    bits, and the peak that follows.
    """

    groups: tuple[WeightGroupSize, ...]
    requirements: MemoryRequirements
    streamed: frozenset[str]
    slice: int
    copies: frozenset[str] = frozenset()

    @property
    def resident(self) -> tuple[WeightGroupSize, ...]:
        """The groups that stay on the device."""
        return tuple(group for group in self.groups if group.name not in self.streamed)

    @property
    def step(self) -> StepRequirements:
        """What a step of one slice takes."""
        return next(step for step in self.requirements.steps if step.pictures == self.slice)

    @property
    def stages(self) -> dict[str, int]:
        """What each phase takes of the arena, from its start."""
        scratch, encode = self.requirements.scratch, self.requirements.encode
        return {
            "prompt": scratch + self.staging(*PROMPT),
            **({"encode": encode} if encode else {}),
            "steps": scratch + self.staging(BLOCKS) + self.step.buffers,
            "decode": self.requirements.decode,
        }

    def staging(self, *parts: str) -> int:
        """The one or two buffers that streamed groups of these parts are copied to."""
        sizes = [group.nbytes for group in self.groups if group.name in self.streamed and group.part in parts]
        return min(2, len(sizes)) * max(sizes, default=0)

    @cached_property
    def arena(self) -> int:
        """The block that all phases work in; latents lie at its end."""
        return round_up(max(self.stages.values()) + self.requirements.latents, GRAIN)

    @cached_property
    def library(self) -> int:
        """The most that libraries allocate by themselves in one phase."""
        return round_up(max(self.requirements.library, self.step.library), GRAIN)

    @cached_property
    def peak(self) -> int:
        """The most that torch, and for captured steps the driver, will have reserved."""
        weights = sum(round_up(self.held(group), GRAIN) for group in self.resident)
        held = self.requirements.blas + self.arena + self.library + self.step.graph
        return weights + held + round_up(self.requirements.pictures, GRAIN) + self.requirements.slack

    @property
    def breakdown(self) -> dict[str, int]:
        """The peak by component; adds up to it."""
        parts = by_part((group.part, self.held(group)) for group in self.resident)
        parts |= {"arena": self.arena, "libraries": self.library, "cuBLAS": self.requirements.blas}
        parts |= {"graphs": self.step.graph, "pictures": self.requirements.pictures}
        return parts | {"rounding and slack": self.peak - sum(parts.values())}

    def held(self, group: WeightGroupSize) -> int:
        """Bytes that a resident group takes on the device."""
        return group.copied if group.name in self.copies else group.nbytes

    @property
    def kept(self) -> int:
        """Bytes of ordinary host memory for the packed weights of groups that are resident as copies."""
        return sum(group.nbytes for group in self.groups if group.name in self.copies)

    @property
    def share_copied(self) -> float:
        """The share of step-time blocks, by weight, that are resident as copies."""
        return self.kept / (sum(group.nbytes for group in self.groups if group.part == BLOCKS) or 1)

    @property
    def saved(self) -> int:
        """Bytes that each step moves less in the device's memory, thanks to copies."""
        return int(DECODED * sum(group.copied - group.nbytes for group in self.groups if group.name in self.copies))

    @property
    def hosted(self) -> int:
        """Bytes of pinned host memory that the streamed groups take."""
        return sum(group.nbytes for group in self.groups if group.name in self.streamed)


def by_part(groups: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes by part, of groups given as part and bytes."""
    parts = dict.fromkeys((BLOCKS, *ALWAYS, *PROMPT), 0)
    for part, nbytes in groups:
        parts[part] += nbytes
    return parts


@lru_cache(maxsize=64)  # every picture asks
def make_plan(
    groups: tuple[WeightGroupSize, ...],
    requirements: MemoryRequirements,
    budget: float,
    keep: frozenset[str] | None = None,
    copies: frozenset[str] | None = None,
) -> MemoryPlan | None:
    """The richest placement whose peak fits `budget`, with as many pictures at once as fit; None where none fits.

    `keep` is what streams now. That placement stays if it fits, and all its blocks are resident or the request has no
    steps, since moving weights costs more than it gains. `copies`: those that there are, which stay if they fit, and
    none is added; None: as many as fit.
    """
    candidates = placements(groups)
    steps = any(step.buffers for step in requirements.steps)
    if keep is not None and not (steps and any(group.part == BLOCKS and group.name in keep for group in groups)):
        candidates = [keep, *candidates]
    for streamed in candidates:
        plans = [MemoryPlan(groups, requirements, streamed, step.pictures) for step in requirements.steps]
        if plans[-1].peak <= budget:
            plan = next(plan for plan in plans if plan.peak <= budget)
            return plan if streamed or requirements.packed else _with_copies(plan, budget, copies)
    return None


def _with_copies(plan: MemoryPlan, budget: float, copies: frozenset[str] | None) -> MemoryPlan:
    """The plan with as many copies as fit; of the smaller kind of block first, since those fill the budget best.

    Of double blocks a copy saves less, too: the text's weights are decoded while the image is multiplied.
    """
    able = [group for group in plan.groups if group.copied and (copies is None or group.name in copies)]
    chosen: list[str] = []
    room = budget - plan.peak
    for group in sorted(able, key=lambda group: group.copied):
        room -= round_up(group.copied, GRAIN) - round_up(group.nbytes, GRAIN)
        if room < 0:
            break
        chosen.append(group.name)
    return replace(plan, copies=frozenset(chosen))


def smallest_budget(groups: Sequence[WeightGroupSize], requirements: MemoryRequirements) -> int:
    """The smallest budget for which `make_plan` finds a plan."""
    last = requirements.steps[-1].pictures
    return min(MemoryPlan(tuple(groups), requirements, streamed, last).peak for streamed in placements(groups))


def placements(groups: Sequence[WeightGroupSize]) -> list[frozenset[str]]:
    """The sets of streamed groups to try, from the richest placement to the poorest."""
    streamed: frozenset[str] = frozenset()
    tried = [streamed]
    for part in reversed(PROMPT):
        streamed |= {group.name for group in groups if group.part == part}
        tried.append(streamed)
    kinds: dict[str, list[WeightGroupSize]] = {}
    for group in groups:
        if group.part == BLOCKS:
            kinds.setdefault(group.name.partition(".")[0], []).append(group)
    # the smaller kind first, as its staging buffers are smaller
    for kind in sorted(kinds.values(), key=lambda kind: max(group.nbytes for group in kind)):
        for n in range(1, len(kind) + 1):
            # evenly apart, so that each copy hides behind the blocks between
            tried.append(streamed | {kind[(2 * i + 1) * len(kind) // (2 * n)].name for i in range(n)})
        streamed = tried[-1]
    return tried


def cost(plan: MemoryPlan, rate: float, steps: int, step_ms: float = 0.0) -> tuple[float, float]:
    """Milliseconds that streaming adds to each new prompt, and to each picture, at `rate` bytes a second to the device.

    `step_ms` is what a step of one slice takes with all weights resident. A block's copy hides behind the blocks that
    run after the streamed block before it. Without `step_ms` nothing hides, and the result is an upper bound. Of
    encoders only copies count: their products take less.
    """
    prompt = sum(group.nbytes for group in plan.groups if group.name in plan.streamed and group.part in PROMPT)
    blocks = [group for group in plan.groups if group.part == BLOCKS]
    total = sum(group.nbytes for group in blocks) or 1
    streamed = [i for i, group in enumerate(blocks) if group.name in plan.streamed]
    added = 0.0
    for before, i in zip([k - len(blocks) for k in streamed[-1:]] + streamed, streamed, strict=False):
        between = sum(blocks[k].nbytes for k in range(before, i)) * step_ms / total  # rounds follow each other
        added += max(0.0, blocks[i].nbytes / rate * 1e3 - between)
    rounds = steps if len(streamed) > 2 else 1  # up to two stay in their buffers
    slices = -(-plan.requirements.batch // plan.slice)
    return prompt / rate * 1e3, slices * rounds * added / max(1, plan.requirements.batch)
