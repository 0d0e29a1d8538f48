"""Who gets the VRAM: a pure function from sizes and a budget to a placement. No device, no torch, no model.

Weights are cut into pieces, each resident or streamed from host memory. Placements are tried from the richest to the
poorest, in order of claim: T5 gives way first, then CLIP, modulation, and step-time blocks one by one; the first
whose predicted peak fits the budget is the plan. The peak is what torch will have reserved: weights, rounded as its
allocator rounds them, the working memory of the largest stage, the finished pictures. All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .allocator import LARGE_STEP, MEDIUM_SEGMENT, MIB, reserved, round_up

ALWAYS = ("embedders", "vae")  # groups that never stream: small, and used in every picture
BLOCKS = "blocks"
PROMPT = ("modulation", "clip", "t5")  # groups of prompt time, the last to give way first
LEFTOVERS = 24 * MIB  # what earlier calls may leave cached
SLACK = LEFTOVERS + 24 * MIB  # and what no footprint sees: 13 MB on an H100


@dataclass(frozen=True, slots=True)
class Piece:
    """Weights that live in one place. `name` such as `single_blocks.7`; `group` one of the names above."""

    name: str
    group: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request takes besides weights.

    `prompt`: the encoders' activations. `steps`: for each number of pictures that may be drawn at once, largest
    first, what the steps take. `decode`: the VAE, in strips of `rows`. `latents`: those of the whole batch, on the way
    from noise to pictures. `fixed`: buffers that are always there. `graphs`: for each number of pictures at once, what
    its captured step keeps besides.
    """

    height: int
    width: int
    batch: int
    prompt: int
    steps: tuple[tuple[int, int], ...]
    decode: int
    rows: int | None
    latents: int = 0
    fixed: tuple[int, ...] = ()
    graphs: tuple[tuple[int, int], ...] = ()

    @property
    def pictures(self) -> int:
        """Bytes of the finished pictures, fp32."""
        return self.batch * self.height * self.width * 3 * 4


@dataclass(frozen=True)  # without slots: what follows is computed once
class Plan:
    """Which pieces stream, how many pictures are drawn at once (`slice`), and the peak that follows."""

    pieces: tuple[Piece, ...]
    demand: Demand
    streamed: frozenset[str]
    slice: int

    @property
    def resident(self) -> tuple[Piece, ...]:
        """The pieces that stay on the device."""
        return tuple(piece for piece in self.pieces if piece.name not in self.streamed)

    @property
    def stages(self) -> dict[str, int]:
        """Working memory of each stage; they take turns in one block."""
        prompt = self.staging(*PROMPT) + self.demand.prompt
        steps = self.staging(BLOCKS) + dict(self.demand.steps)[self.slice]
        latents = self.demand.latents
        return {"prompt": prompt, "steps": steps + latents, "decode": self.demand.decode + latents}

    def staging(self, *groups: str) -> int:
        """The pair of buffers through which the streamed pieces of these groups pass."""
        sizes = [piece.nbytes for piece in self.pieces if piece.name in self.streamed and piece.group in groups]
        return min(2, len(sizes)) * max(sizes, default=0)

    @cached_property
    def workspace(self) -> int:
        """The one block that all stages work in."""
        return max(MEDIUM_SEGMENT, round_up(max(self.stages.values()), LARGE_STEP))

    @cached_property
    def peak(self) -> int:
        """The most that torch will have reserved, everything included."""
        weights = (piece.nbytes for piece in self.resident)
        kept = reserved((*self.demand.fixed, *weights, self.demand.pictures))
        return kept + self.workspace + self.graphs + SLACK

    @cached_property
    def graphs(self) -> int:
        """What captured steps keep besides the workspace."""
        return dict(self.demand.graphs).get(self.slice, 0)

    @property
    def breakdown(self) -> dict[str, int]:
        """The peak by component; adds up to it."""
        parts = dict.fromkeys((BLOCKS, *ALWAYS, *PROMPT), 0)
        for piece in self.resident:
            parts[piece.group] += piece.nbytes
        parts |= {"buffers": sum(self.demand.fixed), "workspace": self.workspace, "graphs": self.graphs}
        parts |= {"pictures": self.demand.pictures}
        return parts | {"rounding and slack": self.peak - sum(parts.values())}

    @property
    def hosted(self) -> int:
        """Bytes of pinned host memory that the streamed pieces take."""
        return sum(piece.nbytes for piece in self.pieces if piece.name in self.streamed)


@lru_cache(maxsize=64)  # every picture asks
def plan(pieces: tuple[Piece, ...], demand: Demand, budget: float, keep: frozenset[str] | None = None) -> Plan | None:
    """The richest placement whose peak fits `budget`, or None where not even the poorest does.

    `keep` is what streams now: that placement stays if it fits and all its blocks are resident, or the request has no
    steps, since moving weights costs more than it brings. Then as many pictures at once as still fit.
    """
    candidates = placements(pieces)
    steps = any(size for _, size in demand.steps)
    if keep is not None and not (steps and any(piece.group == BLOCKS and piece.name in keep for piece in pieces)):
        candidates = [keep, *candidates]
    slices = [number for number, _ in demand.steps]
    for streamed in candidates:
        made = Plan(pieces, demand, streamed, slices[-1])
        if made.peak <= budget:
            larger = (Plan(pieces, demand, streamed, number) for number in slices)
            return next((other for other in larger if other.peak <= budget), made)
    return None


def smallest_budget(pieces: Sequence[Piece], demand: Demand) -> int:
    """The smallest budget that `plan` has a plan for."""
    last = demand.steps[-1][0]
    return min(Plan(tuple(pieces), demand, streamed, last).peak for streamed in placements(pieces))


def placements(pieces: Sequence[Piece]) -> list[frozenset[str]]:
    """Every set of streamed pieces that is tried, from the richest placement to the poorest."""
    streamed: frozenset[str] = frozenset()
    tried = [streamed]
    for group in reversed(PROMPT):
        streamed |= {piece.name for piece in pieces if piece.group == group}
        tried.append(streamed)
    kinds: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.group == BLOCKS:
            kinds.setdefault(piece.name.partition(".")[0], []).append(piece)
    # the smaller kind first: its staging buffers are smaller, too
    for kind in sorted(kinds.values(), key=lambda kind: max(piece.nbytes for piece in kind)):
        tried += [streamed | {piece.name for piece in spread(kind, n)} for n in range(1, len(kind) + 1)]
        streamed = tried[-1]
    return tried


def spread(pieces: Sequence[Piece], n: int) -> Iterator[Piece]:
    """`n` of the pieces, evenly apart, so that each one's copy has the others' time to hide behind."""
    for i in range(n):
        yield pieces[(2 * i + 1) * len(pieces) // (2 * n)]


@dataclass(frozen=True, slots=True)
class Cost:
    """What streaming adds, in milliseconds: to each new prompt, and to each picture."""

    prompt: float
    picture: float


def cost(plan: Plan, rate: float, steps: int, step_ms: float = 0.0) -> Cost:
    """What the plan's streaming adds at `rate` bytes a second from host to device.

    `step_ms` is what a step of one slice takes with everything resident; copies hide behind it. Without, none does,
    and the result is an upper bound. Encoders are taken as copies alone: their products take less than their copies.
    """
    prompt = sum(piece.nbytes for piece in plan.pieces if piece.name in plan.streamed and piece.group in PROMPT)
    blocks = [piece for piece in plan.pieces if piece.group == BLOCKS]
    total = sum(piece.nbytes for piece in blocks) or 1
    copies = [piece.nbytes / rate * 1e3 if piece.name in plan.streamed else 0.0 for piece in blocks]
    computes = [step_ms * piece.nbytes / total for piece in blocks]
    slices = -(-plan.demand.batch // plan.slice)
    added = max(0.0, stream_ms(copies, computes, steps) - steps * sum(computes))
    return Cost(prompt / rate * 1e3, slices * added / max(1, plan.demand.batch))


def stream_ms(copies: Sequence[float], computes: Sequence[float], rounds: int) -> float:
    """Time of `rounds` through units that each compute for so long, and first need so long a copy (0: resident).

    As `residency.Stager` works: every other streamed unit shares one of two buffers, and a copy starts when the one
    before it is done and its buffer's last unit has computed.
    """
    units = [i for i, copy in enumerate(copies) if copy]
    queues = [[k for _ in range(rounds) for k in range(parity, len(units), 2)] for parity in (0, 1)]
    inside: list[int | None] = [None, None]
    ready = [0.0, 0.0]
    clock = lane = 0.0

    def fetch(parity: int) -> None:
        nonlocal lane
        if queues[parity]:
            k = queues[parity].pop(0)
            if inside[parity] != k:
                inside[parity] = k
                ready[parity] = lane = max(lane, clock) + copies[units[k]]

    fetch(0)
    fetch(1)
    for _ in range(rounds):
        k = 0
        for copy, compute in zip(copies, computes, strict=True):
            if copy:
                clock = max(clock, ready[k % 2]) + compute
                fetch(k % 2)
                k += 1
            else:
                clock += compute
    return clock
