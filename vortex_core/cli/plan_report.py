"""A plan for any card, here or not, from a model's sizes alone: the figures of `vortex plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.bundle import open_bundle
from ..errors import GB, VortexInputError
from ..flux1.request import Request
from ..flux1.spec import DEFAULT_STEPS, ModelSpec
from ..memory.arena import MIB
from ..memory.planner import ALWAYS, BLOCKS, PROMPT, MemoryPlan, cost, make_plan, smallest_budget
from ..quant.backends import ReferenceBackend
from ..quant.precision import Fp8
from ..runtime.loading import check_budget
from ..runtime.model import Model

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
    whole = Model(spec, torch.bfloat16, ReferenceBackend(), precision=Fp8(fp8_attention=True), fused=True)
    side = whole.vae.sample_size
    request = Request(0, side if height is None else height, side if width is None else width, DEFAULT_STEPS, batch)
    asked = whole.requirements(request.height, request.width, batch, blas=BLAS)
    plan = make_plan(whole.sizes, asked, budget)
    if plan is None:
        raise VortexInputError(
            f"{budget / GB:g} GB are too little for {batch} of {request.width} x {request.height}, even with "
            f"all weights in host memory; the smallest budget is {smallest_budget(whole.sizes, asked) / GB:.2f} GB."
        )
    return Proposal(plan, budget)
