"""An engine's memory on the device: each call gets a plan, weights move as the plan says, and the budget holds.

`session` opens the memory of one call. A call works in the arena, by offset (memory/arena.py): first dequantized
weights, then the buffers that weights stream through, then the buffers of the steps. The VAE's decoder uses all of that
again. Latents lie at the end. Libraries (text encoders, attention, a few layers of the decoder) allocate by themselves:
a second block is held for them between calls, and given to torch's allocator while they run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from ..device.jobs import warn
from ..device.streams import blas_of
from ..device.vram import Counters, Ledger, available, cap_process, counters, graph_memory, hand_back, shortage
from ..errors import GB, MemoryPressureError, MemoryPressureWarning
from ..flux1.denoiser import Denoiser
from ..flux1.step_buffers import StepSize
from ..memory.arena import Region, Views, block
from ..memory.offload import Prefetcher
from ..memory.planner import MemoryPlan, MemoryRequirements, WeightGroupSize, make_plan, smallest_budget
from ..memory.weights import Placement
from .decoder_graphs import DecoderGraphs
from .graphs import GraphCache
from .lending import Lent
from .loading import ResolvedConfig
from .model import Model

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Launcher = Callable[[Callable[[], None]], None]
MOST_VIEWS = 4096  # views of the arena that are kept; one size has about 30
SPARE = 0.25 * GB  # what a card should have left at the peak; with less, some drivers start to swap


class MemoryManager:
    """Keeps an engine within `budget` (bytes; infinite on the CPU unless one is given), by `plan`."""

    def __init__(self, model: Model, setup: ResolvedConfig, first: MemoryPlan) -> None:
        """`first`: the plan for loading the model."""
        self.device, self.backend = setup.device, setup.backend
        self.budget = math.inf if setup.budget is None else float(setup.budget)
        self.model, self.plan = model, first
        self.placement = Placement(model.groups, setup.device)
        self.graphs = GraphCache(model.transformer, setup.device, model.allocates)
        self.decodes = DecoderGraphs(setup.device)
        self.encoder = Prefetcher([model.encoder_group], setup.device)
        self.arena = self.library = block(0, setup.device)  # what calls work in; what libraries get
        self.views: Views = {}  # of the arena
        self._blas, self._streams = blas_of(setup.device), model.cuda_streams
        self._settled = True  # weights stay where they are if they can; not after another budget was named
        self._within = 0.0  # the budget that `plan` was made for
        self._room = 0.0  # and what the card had left for it
        self._others: int | None = None  # what the process had reserved when it was capped

    def cap(self, on: bool = True) -> None:
        """Let torch refuse the whole process more than it has now plus the budget; or lift that cap."""
        if on and math.isfinite(self.budget) and self.device.type == "cuda":
            self._others = counters(self.device).reserved
            cap_process(self.device, self._others + int(self.budget))
        elif self._others is not None:
            cap_process(self.device, None)
            self._others = None

    def limit(self, budget: float) -> None:
        """Keep within another budget from the next call on; a cap moves with it."""
        self._settled = self._settled and budget == self.budget
        self.budget = float(budget)
        if self._others is not None:
            cap_process(self.device, self._others + int(budget))

    def run(self, requirements: MemoryRequirements, work: Callable[[Place], Result]) -> Result:
        """Do `work` in a session. If memory runs out all the same, try once more with the next tighter plan.

        Raises `MemoryPressureError` where there is no such plan, or memory runs out again.
        """
        limit = math.inf
        for last in (False, True):
            try:
                return self._once(requirements, limit, work)
            except torch.OutOfMemoryError as error:
                cause = error.with_traceback(None)  # its frames would keep what they allocated
            self.release()
            if not last:
                log.warning("Out of memory with a plan for %.2f GB; again with a tighter one", self.plan.peak / GB)
                limit = self.plan.peak - 1
        raise self._pressure("Memory ran out, twice", self.plan, min(limit, self._room)) from cause

    def _once(self, requirements: MemoryRequirements, limit: float, work: Callable[[Place], Result]) -> Result:
        with self.session(requirements, limit) as place:  # in a frame of its own: a place holds the arena
            return work(place)

    @contextmanager
    def session(self, requirements: MemoryRequirements, limit: float = math.inf) -> Iterator[Place]:
        """The memory of one call, within budget and `limit`. Raises `MemoryPressureError` where there is no plan."""
        if len(self.views) > MOST_VIEWS:
            self.views.clear()
        before, within = self.check_workspaces(), min(self.budget, limit)
        if not self._stands(requirements, within):
            self._arrange(requirements, within)
            before = counters(self.device)
        place = Place(self, self.plan)
        # kernels are launched on the tensors' device
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(), place.scratch():
            yield place
        self._audit(before.reserved)

    def check_workspaces(self) -> Counters:
        """Make sure of cuBLAS' workspaces, where captured steps write; to be called after code of others has run."""
        return self._blas.ensure(self._streams)

    def _stands(self, requirements: MemoryRequirements, within: float) -> bool:
        """Whether the latest plan was made for the same request and still holds, so that no new one is needed."""
        plan = self.plan
        if not (
            (requirements, within) == (plan.requirements, self._within)
            and (plan.streamed, plan.copies) == (self.placement.streamed, self.placement.copies)
            and self.arena.numel() >= plan.arena
            and self.library.numel() >= plan.library
            and plan.peak + self._excess(plan) <= within
        ):
            return False
        if self._room >= within:
            return True
        # the card had less left than the budget: ask again, and make a new plan if that has changed
        room = available(self.device, sum(self.components.values()))
        return room is not None and plan.peak <= room <= self._room + SPARE

    def _arrange(self, requirements: MemoryRequirements, within: float) -> None:
        """Make a plan within the budget and what the card has left, and apply it."""
        room = available(self.device, sum(self.components.values()))
        self._within, self._room = within, math.inf if room is None else room
        limit = min(self._within, self._room)
        here = self.placement if self._settled and self.placement.streamed is not None else None
        keep, copies = (None, None) if here is None else (here.streamed, here.copies)
        plan = make_plan(self.model.sizes, requirements, limit, keep, copies)
        if plan is None:
            poorest = make_plan(self.model.sizes, requirements, smallest_budget(self.model.sizes, requirements))
            assert poorest is not None
            raise self._pressure("This does not fit", poorest, limit)
        if self._room - plan.peak < SPARE:
            warn(
                f"The card will have {(self._room - plan.peak) / GB:.2f} GB left at the peak of {plan.peak / GB:.2f} "
                "GB. Close other programs that use it, or name a smaller vram_budget.",
                MemoryPressureWarning,
            )
        copied = bool(self.placement.copies)
        try:
            self._apply(plan, limit)
        except torch.OutOfMemoryError as error:
            self.offload()
            raise self._pressure("Memory ran out", plan, limit) from error.with_traceback(None)
        # copies that leave for packed weights come back: the next plan is made as if there had been none
        self.plan, self._settled = plan, not (requirements.packed and copied)

    def _apply(self, plan: MemoryPlan, limit: float) -> None:
        placement = self.placement
        moves = (
            self.arena.numel() < plan.arena or plan.streamed != placement.streamed or plan.copies != placement.copies
        )
        if moves or plan.peak + self._excess(plan) > limit:
            self.release()
        elif self.library.numel() < plan.library:
            self.library = block(0, self.device)
            hand_back(self.device)
        placement.place(plan.streamed, plan.copies)
        memory = counters(self.device)
        others = memory.allocated - sum(self.components.values())
        if memory.reserved - others > plan.peak:  # pictures of other sizes, which callers no longer hold
            hand_back(self.device)
        if self.arena.numel() < plan.arena:
            self.arena = block(plan.arena, self.device)
        if self.library.numel() < plan.library:
            self.library = block(plan.library, self.device)

    def pack(self) -> None:
        """Have each group in one place, packed, since weights are about to change. The next call makes copies again."""
        placement = self.placement
        if placement.streamed is not None and placement.copies:
            self.release()
            self._settled = False
            try:
                placement.place(placement.streamed)
            except torch.OutOfMemoryError:
                self.offload()
                raise
        for group in placement.groups:
            if group.device is not None and not group.expanded:
                group.host, group.streams = None, False
        placement.prune()

    def resize(self, sizes: tuple[WeightGroupSize, ...]) -> None:
        """Plan for groups of these sizes, and make room for them; their layout is changed afterwards.

        Raises `MemoryPressureError`, and nothing has changed.
        """
        room = available(self.device, sum(self.components.values()))
        limit = min(self.budget, math.inf if room is None else room)
        plan = make_plan(sizes, self.plan.requirements, limit, self.placement.streamed, frozenset())
        if plan is None:
            least = make_plan(sizes, self.plan.requirements, smallest_budget(sizes, self.plan.requirements))
            assert least is not None
            raise self._pressure("With these LoRAs this does not fit", least, limit, sizes)
        self.release()
        if self.placement.streamed is not None:
            self.placement.place(plan.streamed)
        self.plan, self.model.sizes, self._settled = plan, sizes, False

    def release(self) -> None:
        """Give back the arena, the libraries' block and the graphs; weights stay."""
        self.graphs.clear()
        self.decodes.clear()
        self.views.clear()
        self.arena = self.library = block(0, self.device)
        hand_back(self.device)

    def _excess(self, plan: MemoryPlan) -> int:
        """Bytes that are held for larger pictures and that this plan does not need."""
        held = (self.arena.numel(), self.library.numel(), self.graph_bytes)
        needed = (plan.arena, plan.library, plan.step.graph)
        return sum(max(0, has - needs) for has, needs in zip(held, needed, strict=True))

    def _audit(self, before: int) -> None:
        """Warn where a call had torch reserve more than its plan says."""
        grown = counters(self.device).reserved - before
        if grown > self.plan.requirements.pictures + self.plan.step.graph + self.plan.requirements.slack:
            rows = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.ledger.rows.items())
            warn(
                f"This call had torch reserve {grown / GB:.2f} GB more, which was not planned; now, in GB: {rows}.",
                MemoryPressureWarning,
            )

    def ran_out(self, message: str) -> MemoryPressureError:
        """The error for memory that ran out although it was planned."""
        return self._pressure(message, self.plan, self.budget)

    def _pressure(
        self, message: str, plan: MemoryPlan, limit: float, sizes: tuple[WeightGroupSize, ...] | None = None
    ) -> MemoryPressureError:
        asked, room = plan.requirements, min(limit, self.budget)
        what = f"{asked.batch} of {asked.width} x {asked.height}" if asked.batch else "a prompt"
        least = smallest_budget(sizes or self.model.sizes, asked)
        why = shortage(self.device, sum(self.components.values())) if limit < self.budget else ""
        return MemoryPressureError(
            f"{message}: {what}",
            needed=plan.peak,
            available=int(room) if room < math.inf else plan.peak,
            breakdown=plan.breakdown,
            remedy=(f"Of the card: {why}. " if why else "")
            + f"The smallest budget for it is {least / GB:.2f} GB; smaller pictures or batches take less.",
        )

    @property
    def blas(self) -> int:
        """Bytes of cuBLAS' workspaces; all engines of a device share one set."""
        return self._blas.nbytes(self._streams)

    def address(self) -> tuple[int, ...]:
        """The addresses that a captured step uses outside the arena, as far as torch tells them."""
        return (*self.placement.addresses, self._blas.generation)

    @property
    def components(self) -> dict[str, int]:
        """Bytes of tensors on the device between calls, by component."""
        blocks = {"arena": self.arena.numel(), "libraries": self.library.numel()}
        return {**self.placement.resident_bytes, **blocks, "cuBLAS": self.blas}

    @property
    def graph_bytes(self) -> int:
        """Bytes that graphs keep: reserved by torch, or by the driver, which does not tell for whom."""
        kept = (self.graphs, self.decodes)
        outside = min(graph_memory(self.device), sum(graphs.planned for graphs in kept))
        return sum(graphs.reserved for graphs in kept) + outside

    @property
    def nbytes(self) -> int:
        """Bytes that offloading frees: the components without cuBLAS, and what graphs keep."""
        return sum(self.components.values()) - self.blas + self.graph_bytes

    @property
    def ledger(self) -> Ledger:
        """What holds the memory reserved on the device."""
        memory, outside = counters(self.device), graph_memory(self.device)
        components = self.components if self.device.type == "cuda" else {}
        pinned = {"streamed weights": self.placement.pinned_bytes}
        graphs = self.graphs.reserved + self.decodes.reserved + outside
        return Ledger(components, memory.allocated, memory.reserved, graphs, outside, pinned)

    def offload(self) -> None:
        """Move everything to host memory and give the VRAM back to the driver."""
        self.placement.offload()
        self.release()

    def resume(self) -> None:
        """Bring everything back, as for the latest call. Raises as `session`; then everything stays offloaded."""
        self._arrange(self.plan.requirements, self.budget)


class Place:
    """The memory of a call while its session is open."""

    def __init__(self, memory: MemoryManager, plan: MemoryPlan) -> None:
        self.plan, self._memory = plan, memory
        self._block, self._end = memory.arena, plan.arena - plan.requirements.latents
        self.maps = self._block[: self._end]  # memory for the VAE

    def scratch(self) -> AbstractContextManager[None]:
        """Inside, NF4 weights are dequantized into the arena's start, where the plan has scratch for them."""
        backend, region = self._memory.backend, Region(self._block, 0, self._memory.views)
        if backend is None or not self.plan.requirements.scratch:
            return nullcontext()
        return backend.using(*(region.take((size,), torch.uint8) for size in self._memory.model.scratch))

    @contextmanager
    def libraries(self) -> Iterator[None]:
        """Inside, torch's allocator has the block that is held for libraries."""
        memory, size = self._memory, self._memory.library.numel()
        memory.library = block(0, memory.device)
        yield
        memory.library = block(size, memory.device)  # not after an error: its traceback keeps tensors alive

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Inside, text encoders and modulation can run, streamed or not."""
        with self._memory.placement.prompt.open(self._region()), self.libraries():
            yield

    @contextmanager
    def lent(self) -> Iterator[Lent]:
        """Inside, code of others can multiply by the weights of the transformer and of modulation, streamed or not."""
        memory, prefetcher = self._memory, self._memory.placement.steps
        scratch = Region(self._block, 0, memory.views).take((self.plan.requirements.scratch,), torch.uint8)
        using = nullcontext() if memory.backend is None else memory.backend.using(scratch)
        with prefetcher.open(self._region()), using, self.libraries():
            yield Lent(memory.model, prefetcher)

    @contextmanager
    def steps(self, height: int, width: int, tokens: int, rounds: int, away: int = 0) -> Iterator[Denoiser]:
        """What draws pictures of this size with at most `tokens` of text, of which `away` are of one to avoid; the
        blocks run `rounds` times.
        """
        memory, region, prefetcher = self._memory, self._region(), self._memory.placement.steps
        size = StepSize(self.plan.slice, tokens, height // 16 * (width // 16), away)
        with prefetcher.open(region, rounds):
            velocity = memory.graphs.open(size, region, prefetcher, memory.address, self.libraries)
            inputs = memory.model.call_inputs(height, width, tokens, away)
            taken = {name: region.take(shape, kind) for name, (shape, kind) in inputs.items()}
            yield Denoiser(memory.model.transformer, velocity, taken)

    @contextmanager
    def encoder(self) -> Iterator[Tensor]:
        """Inside, the VAE's encoder can run; memory for its maps."""
        region = Region(self.maps, 0, self._memory.views)
        with self._memory.encoder.open(region), self.libraries():
            yield self.maps[region.used :]

    def launcher(self, height: int, width: int) -> Launcher | None:
        """What launches the decode of latents of this size, captured; None where it is launched as it is."""
        memory, rows = self._memory, self.plan.requirements.rows
        if not memory.model.captures_decodes:
            return None
        key = (height, width, rows, self.maps.data_ptr(), *memory.address())
        return lambda run: memory.decodes.launch(key, run, memory.model.decoder_bytes(height, width))

    def latents(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """fp32 tensors of these shapes, uninitialized; they keep their place through the steps and the VAE."""
        region = Region(self._block, self._end, self._memory.views)
        return tuple(region.take(shape, torch.float32) for shape in shapes)

    def _region(self) -> Region:
        return Region(self.maps, self.plan.requirements.scratch, self._memory.views)
