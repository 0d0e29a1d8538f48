"""A plan for any card, here or not, from a model's sizes alone: the figures of `vortex plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bench import cards, roofline
from ..bench.cards import Card
from ..bench.roofline import Prediction
from ..checkpoint.bundle import open_bundle
from ..errors import GB, VortexInputError
from ..flux1.request import Request
from ..flux1.spec import DEFAULT_STEPS, ModelSpec
from ..memory.arena import MIB
from ..memory.planner import ALWAYS, BLOCKS, PROMPT, MemoryPlan, cost, make_plan, smallest_budget
from ..quant.backends import ReferenceBackend
from ..quant.precision import Int8
from ..runtime.loading import check_budget
from ..runtime.model import Model
from .terminal import grid

if TYPE_CHECKING:
    from .console import Grid

BLAS = 3 * 33 * MIB  # cuBLAS' workspaces on three streams of a Hopper card; earlier cards take a quarter
WORDS = {
    BLOCKS: "step-time blocks",
    "embedders": "embedders, final layer",
    "vae": "VAE decoder",
    "modulation": "modulation",
    "clip": "CLIP",
    "t5": "T5",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A part of the model in bytes: all of it, what it takes on the card, what streams."""

    name: str
    nbytes: int
    resident: int
    streamed: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan in words and figures."""

    plan: MemoryPlan
    budget: int
    spec: ModelSpec

    @property
    def rows(self) -> list[Row]:
        """The parts of the model; the first ones are placed on the card first."""
        rows = []
        for part in (BLOCKS, *ALWAYS, *PROMPT):
            groups = [group for group in self.plan.groups if group.part == part]
            streamed = sum(group.nbytes for group in groups if group.name in self.plan.streamed)
            resident = sum(self.plan.held(group) for group in groups if group.name not in self.plan.streamed)
            rows.append(Row(WORDS[part], sum(group.nbytes for group in groups), resident, streamed))
        return rows

    @property
    def sentences(self) -> list[str]:
        """What the table of parts does not say, one line each."""
        plan, asked = self.plan, self.plan.requirements
        stages = ", ".join(f"{name} {size / GB:.2f}" for name, size in plan.stages.items())
        decoded = "whole" if asked.rows is None else f"in strips of {asked.rows} rows"
        batch = f"{asked.batch} pictures, {plan.slice} at once" if asked.batch > 1 else "1 picture"
        return [
            f"{plan.arena / GB:6.2f} GB  arena, the largest of: {stages}; latents",
            f"{(plan.library + asked.blas + plan.step.graph) / GB:6.2f} GB  libraries: encoders, cuBLAS, attention",
            f"{asked.pictures / GB:6.2f} GB  {batch} of {asked.width} x {asked.height}, decoded {decoded}",
            f"{plan.peak / GB:6.2f} GB  predicted peak of torch reserved, of {self.budget / GB:g} GB; "
            "the CUDA context comes on top",
            f"{plan.hosted / GB:6.2f} GB  pinned host memory",
            *self._copies,
        ]

    @property
    def _copies(self) -> list[str]:
        plan = self.plan
        if not plan.copies:
            return []
        blocks = sum(group.part == BLOCKS for group in plan.groups)
        return [
            f"{plan.kept / GB:6.2f} GB  host memory for the packed weights of {len(plan.copies)} of {blocks} blocks, "
            f"which stay decoded to 8 bits: each step moves {plan.saved / GB:.1f} GB less"
        ]

    def costs(self, rate: float, step_ms: float) -> dict[str, float]:
        """What streaming adds at `rate` bytes a second."""
        found = cost(self.plan, rate, DEFAULT_STEPS, step_ms)
        return dict(zip(("prompt_ms", "picture_ms"), found, strict=True))

    def predictions(self, card: Card) -> list[Prediction]:
        """The times of one slice on `card`, in each precision that it can run, that of `fast` first."""
        plan, size = self.plan, (self.plan.requirements.height, self.plan.requirements.width)

        def predict(name: str) -> Prediction:
            return roofline.predict(card, self.spec, *size, name, pictures=plan.slice, copied=plan.share_copied)

        return [predict(name) for name in card.precisions]

    @property
    def figures(self) -> dict[str, Any]:
        """Everything as numbers, for JSON."""
        plan = self.plan
        return {
            "budget": self.budget,
            "peak": plan.peak,
            "breakdown": plan.breakdown,
            "stages": plan.stages,
            "slice": plan.slice,
            "strip_rows": plan.requirements.rows,
            "pinned": plan.hosted,
            "streamed": sorted(plan.streamed),
            "copies": sorted(plan.copies),
            "kept": plan.kept,
            "saved": plan.saved,
            "parts": [asdict(row) for row in self.rows],
        }


def propose(
    vram: float,
    height: int | None,
    width: int | None,
    batch: int,
    model: str | Path | None,
    others: Mapping[str, Path | None],
) -> Proposal:
    """The plan for `batch` pictures within `vram` GB. `model` None: FLUX.1-schnell as it was released.

    Raises `VortexInputError` if there is no plan; the message has the smallest budget that has one.
    """
    budget = check_budget(vram, None)
    assert budget is not None
    spec = ModelSpec() if model is None else open_bundle(model, **others).spec
    # of the precisions the one that takes the most: 8 bits with the library's attention
    whole = Model(spec, torch.bfloat16, ReferenceBackend(), precision=Int8(), fused=True)
    side = whole.vae.sample_size
    request = Request(0, side if height is None else height, side if width is None else width, DEFAULT_STEPS, batch)
    asked = whole.requirements(request.height, request.width, batch, blas=BLAS)
    plan = make_plan(whole.sizes, asked, budget)
    if plan is None:
        raise VortexInputError(
            f"{budget / GB:g} GB are too little for {batch} of {request.width} x {request.height}, even with "
            f"all weights in host memory; the smallest budget is {smallest_budget(whole.sizes, asked) / GB:.2f} GB."
        )
    return Proposal(plan, budget, spec)


def known_card(name: str, vram: float) -> Card:
    """The figures of a card. Raises `VortexInputError` for one that is not known, or has less than `vram` GB."""
    card = cards.get(name)
    if vram * GB > card.vram:
        raise VortexInputError(f"--vram is {vram:g} GB, but the {card.name} has {card.vram / GB:.1f} GB.")
    return card


def parts_table(made: Proposal) -> Grid:
    """Where the parts of the model are."""
    table = grid("part", "size", "on the card", "streams")
    for row in made.rows:
        sizes = (row.nbytes, row.resident, row.streamed)
        table.add_row(row.name, *(f"{size / GB:6.2f} GB" if size else "" for size in sizes))
    return table


def prediction_table(predictions: Sequence[Prediction], pictures: int) -> Grid:
    """What is predicted for a card, a column for each precision; the first one is that of `fast`."""
    first = predictions[0]
    batch = f" of {pictures} pictures at once" if pictures > 1 else ""
    title = f"{first.card.name}, PREDICTED, not measured: {first.steps} steps{batch}"
    made = grid("part", *(f"{p.precision} (fast)" if p is first else p.precision for p in predictions), title=title)

    def row(part: str, times: Iterable[float]) -> None:
        made.add_row(part, *(f"{seconds:6.2f} s" for seconds in times))

    for part in roofline.PICTURE:
        row(part, (p.parts[part].seconds for p in predictions))
    row("in all", (p.picture.seconds for p in predictions))
    row("at least, at the card's full rates", (p.picture.floor for p in predictions))
    row(f"{roofline.PROMPT} adds, without streaming", (p.parts[roofline.PROMPT].seconds for p in predictions))
    return made
