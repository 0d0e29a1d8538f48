"""From files to a placed model: options are checked before anything is read, then weights are read group by group."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..checkpoint.bundle import Bundle
from ..checkpoint.cache import CACHED, Cache
from ..device.jobs import ask, check
from ..device.select import resolve_device
from ..device.streams import streams_of
from ..device.vram import available, hand_back, shortage, snapshot
from ..errors import GB, VortexInitializationError, VortexInputError, quoted
from ..flux1.request import check_choice
from ..flux1.spec import MODES, MOST_BUDGET, QUANTIZATIONS, ModelSpec
from ..kernels import Kernels, choose_kernels
from ..memory.planner import MemoryPlan, make_plan, smallest_budget
from ..memory.weights import Placement
from ..quant.backends import BACKENDS, Backend, choose_backend
from ..quant.precision import Precision
from ..storage.materialize import Target
from ..utils.numeric import finite
from ..utils.timing import Stopwatch, mark
from .model import Model, Sources
from .modes import Choice, choose_precision

log = logging.getLogger(__name__)

OnLoad = Callable[[int, int], None]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEFAULT_BUDGET = 6.5 * GB
CONTEXT = 1 * GB  # what a card needs for the CUDA context and the desktop


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The options of a load, checked. `backend` None: 16-bit weights. `budget` None: a device without VRAM.

    `mode` is the one that will run, in `precision`; the caller may have asked for another. `choice` says why.
    """

    device: torch.device
    quantization: str
    dtype: torch.dtype
    backend: Backend | None
    budget: int | None
    mode: str
    kernels: Kernels
    choice: Choice

    @property
    def precision(self) -> Precision:
        """How products are computed."""
        return self.choice.precision

    @classmethod
    def check(
        cls,
        device: str | torch.device | None,
        quantization: str,
        dtype: torch.dtype | None,
        backend: str | None,
        vram_budget: float | None,
        mode: str,
    ) -> ResolvedConfig:
        """Check the options of `Engine.load`, and try the kernels. Raises what `Engine.load` does."""
        where = resolve_device(device)
        budget = check_options(where, quantization, dtype, backend, vram_budget, mode)
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        try:
            chosen = choose_backend(where, backend) if quantization == "nf4" else None
            kernels = choose_kernels(where)
            choice = choose_precision(mode, where, dtype, chosen, kernels)
        except torch.OutOfMemoryError as error:
            raise out_of_memory("There is no room to try the kernels", where, None) from error.with_traceback(None)
        mode = mode if choice.precision.scaled else "exact"
        return cls(where, quantization, dtype, chosen, budget, mode, kernels, choice)


def check_options(
    where: torch.device,
    quantization: str,
    dtype: torch.dtype | None,
    backend: str | None,
    vram_budget: float | None,
    mode: str,
) -> int | None:
    """Check the options of `Engine.load` as far as possible without trying kernels; the budget in bytes."""
    check_choice("quantization", quantization, QUANTIZATIONS)
    check_choice("mode", mode, MODES)
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    if dtype is not None and dtype not in DTYPES:
        raise VortexInputError(f"dtype is one of {', '.join(map(str, DTYPES))}, not {quoted(dtype)}.")
    return check_budget(vram_budget, snapshot(where).total if where.type == "cuda" else None)


def check_budget(vram_budget: object, total: int | None) -> int | None:
    """The budget in bytes, from GB, for a card of `total` bytes; by default 6.5 GB, or less on a smaller card.

    `total` None: a device without VRAM, which has no budget by default. Raises `VortexInputError`.
    """
    if vram_budget is None:
        return None if total is None else int(min(DEFAULT_BUDGET, max(total - CONTEXT, total / 2)))
    budget = finite(vram_budget)
    if budget is None or budget > MOST_BUDGET:
        raise VortexInputError(
            f"vram_budget is a number of GB (10^9 bytes), such as 6.5, and finite, not {quoted(vram_budget)}."
        )
    if budget <= 0:
        raise VortexInputError(f"vram_budget must be more than 0 GB, and finite, not {budget}.")
    if total is not None and budget * GB > total:
        raise VortexInputError(
            f"vram_budget is {budget:g} GB, but the card has {total / GB:.2f} GB. Name at most "
            f"{(total - CONTEXT) / GB:.1f}, which leaves 1 GB for the CUDA context and the desktop."
        )
    return int(budget * GB)


def build(spec: ModelSpec, setup: ResolvedConfig) -> Model:
    """The modules on `meta`, ready for the weights."""
    return Model(spec, setup.dtype, setup.backend, setup.kernels, streams_of(setup.device), setup.precision)


def first_plan(name: str, model: Model, setup: ResolvedConfig, blas: int) -> MemoryPlan:
    """The plan for one picture at the model's native size, or at the largest size that fits the budget.

    Raises `VortexInputError` where no size fits, and `VortexInitializationError` where the card has not enough left.
    """
    budget = math.inf if setup.budget is None else setup.budget
    side = model.vae.sample_size
    sides = [side, *(smaller for smaller in (512, 256, 64) if smaller < side)]
    asked = [model.requirements(side, side, 1, blas=blas) for side in sides]
    plan = next((found for requirements in asked if (found := make_plan(model.sizes, requirements, budget))), None)
    if plan is None:
        needs = [f"{r.width} x {r.height} takes {smallest_budget(model.sizes, r) / GB:.2f} GB" for r in asked]
        raise VortexInputError(
            f"A VRAM budget of {budget / GB:g} GB is too small for {name}, even with all weights in host memory: "
            f"{', '.join(needs)}."
        )
    room = available(setup.device, blas)
    if room is not None and plan.peak > room:
        raise out_of_memory("There is not enough VRAM to load", setup.device, plan)
    return plan


def fill(
    model: Model,
    bundle: Bundle,
    setup: ResolvedConfig,
    plan: MemoryPlan,
    placement: Placement,
    on_progress: OnLoad | None,
    cache: Cache | None,
) -> None:
    """Read every weight, group by group, to its place in the plan. Host memory holds about one more group.

    Raises `VortexCheckpointError` before it takes device memory, and torch's `OutOfMemoryError`.
    """
    sources = {kind: part.tensors for kind, part in bundle.parts.items()}
    done, total = 0, model.check(sources)

    def progress(count: int) -> None:
        nonlocal done
        check()
        done += count
        if on_progress is not None:
            ask(on_progress, min(done, total), total)

    target = Target(setup.device, setup.dtype, progress)
    with Stopwatch(setup.device) as watch:
        if cache is not None and setup.backend is not None:
            # a part without an entry is read once to be quantized, and its new entry is read after that
            total += sum(part.nbytes for kind, part in bundle.parts.items() if cache.lacks(part, kind))
            for kind in CACHED:
                sources[kind] = cache.quantized(bundle.parts[kind], kind, model.modules[kind], target)
            total = done + model.check(sources)
            mark("cache")
        model.t5.load_table(sources["t5"], target)
        model.clip.load_table(sources["clip"], target)
        mark("tables")
        _place(model, sources, target, plan, placement)
        for source in sources.values():
            source.settle()
    phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in watch.phases.items())
    log.debug("Weights arrived in %.2f s: %s", watch.seconds, phases)


def _place(model: Model, sources: Sources, target: Target, plan: MemoryPlan, placement: Placement) -> None:
    memory = placement.host_memory(plan.hosted)
    mark("host memory")
    # all resident buffers first: what reading allocates for a moment then leaves no holes between them
    hand_back(target.device)
    resident = {
        group.name: torch.empty(group.nbytes, dtype=torch.uint8, device=target.device) for group in plan.resident
    }
    for group in model.groups:
        # groups that stream are read to the device, too: its copies to pinned memory are faster than a file's
        model.read(group, sources, target)
        if group.name in plan.streamed:
            group.settle(host=memory.take(group.measure()))
        else:
            group.settle(device=resident.pop(group.name))
        mark(group.part)
    if model.no_encoder is None:
        host = torch.device("cpu")
        model.read(model.encoder_group, sources, target, host)
        model.encoder_group.settle(host=torch.empty(model.encoder_group.measure(), dtype=torch.uint8))
        mark("encoder")
    placement.start(plan.streamed)
    hand_back(target.device)
    placement.place(plan.streamed, plan.copies)


def out_of_memory(message: str, device: torch.device, plan: MemoryPlan | None) -> VortexInitializationError:
    """The error of a load that does not fit: what it needs, what holds the rest, and which budget would do."""
    memory, room, why = snapshot(device), available(device), shortage(device)
    remedy = "Close other programs that use the card (`nvidia-smi` lists them) or unload other models, and retry."
    if plan is not None:
        least = smallest_budget(plan.groups, plan.requirements)
        size = f"{plan.requirements.width} x {plan.requirements.height}"
        remedy += f" The smallest vram_budget that draws {size} is {least / GB:.2f} GB."
    return VortexInitializationError(
        f"{message} on {device}" + (f": {why}" if why else ""),
        needed=None if plan is None else plan.peak,
        free=memory.free if room is None else max(0, room),
        total=memory.total,
        allocated=memory.allocated,
        remedy=remedy,
    )
