"""An engine's share of the device: each call is planned, weights move where its plan wants them, the budget holds."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from .allocator import segment
from .errors import GB, MemoryPressureError, MemoryPressureWarning, VortexInputError
from .kernels.operand import FP8
from .loading import Setup
from .model import Model
from .placement import Placement
from .planner import LEFTOVERS, SLACK, Demand, Plan, plan, smallest_budget
from .plans import Plans
from .vram import Ledger, available, cap_process, counters

log = logging.getLogger(__name__)

Result = TypeVar("Result")
SPARE = 0.25 * GB  # what a card should have left at the peak; with less, some drivers start to swap


class Room:
    """Keeps what is on the device within `budget` (bytes; None on the CPU, where nothing is planned).

    `plan` is the latest; `resident` is False while everything is offloaded.
    """

    def __init__(self, model: Model, setup: Setup) -> None:
        self.device, self.dtype, self.budget, self.backend = setup.device, setup.dtype, setup.budget, setup.backend
        self.model = model
        self.placement = Placement(model.units, setup.device)
        allocates = setup.backend is not None and setup.backend.name == "reference"
        self.plans = Plans(model.transformer, self.placement.workspace, allocates=allocates)
        self.plan: Plan | None = None
        self._limit = 0.0  # what `plan` was made within
        self.resident = False
        self.busy = False  # in the middle of a call
        self._capped = False
        self._warm = threading.local()

    def cap(self) -> None:
        """Have torch refuse more than the budget to the whole process, besides what it has now."""
        if self.budget is not None and self.device.type == "cuda":
            cap_process(self.device, counters(self.device).reserved + self.budget)
            self._capped = True

    def uncap(self) -> None:
        """Undo `cap`."""
        if self._capped:
            cap_process(self.device, None)
            self._capped = False

    def arrived(self) -> None:
        """Weights are in place: make the buffer that every product needs."""
        if self.backend is not None:
            self.backend.reserve(self.model.largest_linear, self.dtype)
            if self.model.fast:  # a lane of its own for the text
                self.backend.reserve(self.model.text_linear, FP8, lane=1)
        self.resident = True

    def use(self, demand: Demand | None, work: Callable[[Plan | None], Result]) -> Result:
        """Do `work` where it fits. When memory runs out nevertheless, once more with the next tighter plan.

        Raises `MemoryPressureError` where there is none, or that runs out, too; and `VortexInputError` in the middle
        of another call, whose memory this one would take.
        """
        self.check_idle()
        self.busy = True
        try:
            return self._use(demand, work)
        finally:
            self.busy = False

    def check_idle(self) -> None:
        """Raise `VortexInputError` in the middle of a call."""
        if self.busy:
            raise VortexInputError(
                "on_step may not use the engine that calls it, which is still drawing. Keep a copy of the latents, and "
                "call the engine when generate has returned."
            )

    def _use(self, demand: Demand | None, work: Callable[[Plan | None], Result]) -> Result:
        if self.budget is None or demand is None:
            return work(None)
        limit = float(self.budget)
        for final in (False, True):
            made = self._same(demand, limit) or self._make(demand, limit)
            before = counters(self.device).reserved
            try:
                with self.placement.workspace.use():
                    result = work(made)
                self._audit(made, before)
                return result
            except torch.OutOfMemoryError as error:
                cause = error.with_traceback(None)  # its frames would keep what they allocated
            self.placement.workspace.release()
            if final:
                break
            log.warning("Out of memory with a plan for %.2f GB; again with the next tighter one", made.peak / GB)
            limit = made.peak - 1
        raise self._pressure("Memory ran out, twice", made, limit) from cause

    def _same(self, demand: Demand, limit: float) -> Plan | None:
        """The latest plan, if it is for the same and still stands: then nobody need ask the driver."""
        made = self.plan
        stands = (
            made is not None
            and (demand, limit) == (made.demand, self._limit)
            and self.resident
            and made.streamed == self.placement.streamed
            and self.placement.workspace.nbytes >= made.workspace > 0
            and self.plans.nbytes >= made.graphs
            and made.peak + self._excess(made) <= limit
            and hasattr(self._warm, "done")
        )
        return made if stands else None

    def _make(self, demand: Demand, limit: float) -> Plan:
        """Plan within `limit` and what the card has left, and make it so."""
        room = available(self.device, sum(self.components.values()))
        limit = limit if room is None else min(limit, room)
        made = plan(self.model.pieces, demand, limit, keep=self.placement.streamed)
        if made is None:
            least = smallest_budget(self.model.pieces, demand)
            raise self._pressure("This does not fit", plan(self.model.pieces, demand, least), limit)
        if room is not None and room - made.peak < SPARE:
            warnings.warn(
                f"The card will have {(room - made.peak) / GB:.2f} GB left at the peak of {made.peak / GB:.2f} GB. "
                "Close other programs that use it, or name a smaller vram_budget.",
                MemoryPressureWarning,
                stacklevel=4,
            )
        try:
            self._move(made, limit)
        except torch.OutOfMemoryError as error:
            self.offload()
            raise self._pressure("Memory ran out", made, limit) from error.with_traceback(None)
        self.plan, self._limit = made, limit
        return made

    def _move(self, made: Plan, limit: float) -> None:
        workspace = self.placement.workspace
        if made.peak + self._excess(made) > limit:
            workspace.release()
        if made.streamed != self.placement.streamed or workspace.nbytes < made.workspace:
            self.plans.clear()  # weights or the block move
        self.placement.place(made.streamed)
        self.arrived()
        if self.device.type == "cuda":
            self._warm_up()
            self._tidy(made)
        workspace.reserve(made.workspace)

    def _excess(self, made: Plan) -> int:
        """What larger pictures left that this one does not need."""
        workspace = max(0, self.placement.workspace.nbytes - made.workspace)
        return workspace + max(0, self.plans.nbytes - made.graphs)

    def _warm_up(self) -> None:
        """Have this thread's cuBLAS take the workspaces that it keeps for streams, so that they do not lie in ours."""
        if hasattr(self._warm, "done"):
            return
        x = torch.ones(16, 16, dtype=self.dtype, device=self.device)
        torch.cuda.synchronize(self.device)
        transformer = self.model.transformer
        streams = (None, transformer.side, self.plans.stream) if transformer.fused else (None,)
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.nn.functional.linear(x, x, x[0]).addmm_(x, x)  # cuBLASLt's product, and cuBLAS' own
        torch.cuda.synchronize(self.device)
        self._warm.done = True

    def _tidy(self, made: Plan) -> None:
        """Give back what earlier pictures of other sizes left cached, where it does not fit beside this one."""
        memory, workspace = counters(self.device), self.placement.workspace
        others = memory.allocated - sum(self.components.values())
        growth = max(0, made.workspace - workspace.nbytes) + max(0, made.graphs - self.plans.nbytes)
        if memory.reserved - others + growth > made.peak - SLACK + LEFTOVERS + self._excess(made):
            torch.cuda.empty_cache()

    def _audit(self, made: Plan, before: int) -> None:
        """Warn where a call had torch reserve more than its plan says."""
        grown = counters(self.device).reserved - before
        if grown > segment(made.demand.pictures) + made.graphs + SLACK:
            rows = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.ledger.rows.items())
            warnings.warn(
                f"This call had torch reserve {grown / GB:.2f} GB more, which was not planned; now, in GB: {rows}.",
                MemoryPressureWarning,
                stacklevel=4,
            )

    def _pressure(self, message: str, made: Plan | None, limit: float) -> MemoryPressureError:
        assert made is not None
        demand = made.demand
        what = f"{demand.batch} of {demand.width} x {demand.height}" if demand.batch else "a prompt"
        least = smallest_budget(self.model.pieces, demand)
        return MemoryPressureError(
            f"{message}: {what}",
            needed=made.peak,
            available=int(limit),
            breakdown=made.breakdown,
            remedy=f"The smallest budget for it is {least / GB:.2f} GB; smaller pictures or batches take less.",
        )

    @property
    def components(self) -> dict[str, int]:
        """Bytes of tensors on the device between calls, by component."""
        decoded = self.backend.nbytes if self.backend else 0
        return {**self.placement.resident_bytes, "decoded weight": decoded}

    @property
    def nbytes(self) -> int:
        """Bytes on the device between calls: the components, and what graphs keep."""
        return sum(self.components.values()) + self.plans.nbytes

    @property
    def ledger(self) -> Ledger:
        """Who holds what torch has reserved on the device."""
        memory = counters(self.device)
        components = self.components if self.device.type == "cuda" else {}
        return Ledger(components, memory.allocated, memory.reserved, self.plans.nbytes)

    @torch.inference_mode()
    def offload(self) -> None:
        """Move everything to host memory and hand the VRAM back to the driver."""
        self.resident = False
        self.plans.clear()
        if self.backend is not None:
            self.backend.release()
        self.placement.offload()

    @torch.inference_mode()
    def resume(self) -> None:
        """Bring everything back to the device. Raises torch's `OutOfMemoryError`, and nothing is there."""
        assert self.plan is not None
        try:
            self.placement.place(self.plan.streamed)
            self.arrived()
        except torch.OutOfMemoryError:
            self.offload()
            raise
