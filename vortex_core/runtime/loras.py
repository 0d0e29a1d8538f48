"""The LoRAs of an engine: from files with strengths to what its weights get, and back to the bits of before.

NF4 stays as it is: decoding adds a low-rank update (kernels/adapter.py). Factors are buffers of the linears, so they
lie in the groups that the planner places, and stream with their block where there is no room. What is not NF4 (norms,
biases, small linears, CLIP) is computed anew from an original that is kept in host memory while it is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ..checkpoint.lora_kinds import acts_at_prompt_time
from ..errors import VortexCheckpointError, VortexInputError
from ..kernels import Adapter, weights_declined
from ..memory.offload import WeightGroup
from ..nf4 import NF4Weight, dequantize
from ..quant.adapters import LoraFile, LoraPart, LowRank, Magnitude
from ..quant.linear import NF4Linear
from ..quant.low_rank import adapter_of, extent, owners
from ..utils.timing import synchronize
from .memory_manager import MemoryManager
from .model import Model

log = logging.getLogger(__name__)

MOST = 32  # files at once
Chosen = tuple[tuple[LoraFile, float], ...]
Plain = tuple[str, str, str]  # a tensor that is not NF4: its part, module and name
Gains = dict[NF4Linear, tuple[Tensor, list[Tensor | None]]]  # DoRA's: absmax as it was, and gains less 1 of each file


class Loras:
    """What an engine draws with; `chosen` now. Use only on the engine's thread."""

    def __init__(self, model: Model, memory: MemoryManager) -> None:
        self.chosen: Chosen = ()
        self.at_prompt_time: tuple[tuple[object, float], ...] = ()  # those that change what a prompt becomes, by token
        self._model, self._memory, self._device = model, memory, memory.device
        self._wanted: dict[NF4Linear, list[list[LowRank]]] = {}  # what each linear's factors are made of
        self._factor_type = torch.float32 if model.dtype == torch.float32 else torch.float16
        self._owners = torch.zeros(0, dtype=torch.int64)  # of each rank of those, the file whose strength it has
        self._originals: dict[Plain, Tensor] = {}  # in host memory
        self._gains: Gains = {}
        self._whole = True  # False while weights change: after an error then, nothing is known of them

    def use(self, chosen: Chosen) -> None:
        """Draw with these from now on; nothing happens if it is what there is.

        Raises `VortexInputError` and `VortexCheckpointError` for what cannot be used, and `MemoryPressureError` where
        there is no room; then it stays as it was. After another error half-way there is no LoRA at all.
        """
        if not self._whole:
            self._fall_back()
        chosen = tuple((file, strength) for file, strength in chosen if strength != 0)
        files, before = ([id(file) for file, _ in which] for which in (chosen, self.chosen))
        if files == before and [strength for _, strength in chosen] == [strength for _, strength in self.chosen]:
            return
        if files != before:
            self._check(chosen)
        synchronize(self._device)  # blocks may still be copied from host memory, for the picture before
        self._memory.pack()
        scaled = self._model.precision.scaled
        if (files != before and _need_weights(chosen)) or (scaled and self._memory.placement.streamed):
            self._memory.release()  # room for a weight in fp32, or for a group that streams
        gains: Gains = {}
        wanted = self._wanted if files == before else self._updates(chosen, gains)
        changed = [] if files == before else self._resize(wanted)
        touched = {*self._wanted, *wanted, *self._gains, *gains}
        self._whole = False
        try:
            if files != before:
                self._attach(wanted, changed, gains)
            self._write(chosen, touched)
        except BaseException:
            self._fall_back()
            raise
        self.chosen, self._whole = chosen, True
        self.at_prompt_time = tuple((file.token, strength) for file, strength in chosen if _acts_early(file))
        log.info("LoRAs: %s", ", ".join(f"{file.path} x {strength:g}" for file, strength in chosen) or "none")

    def _check(self, chosen: Chosen) -> None:
        if len(chosen) > MOST:
            raise VortexInputError(f"{len(chosen)} LoRAs are too many at once; {MOST} are the most.")
        linears = [linear for group in self._model.groups for linear in self._linears[group]]
        if chosen and not linears:
            raise VortexInputError("LoRAs are added to NF4 weights, and these are in 16 bits.")
        declined = weights_declined(self._device) if any(linear.backend.eight for linear in linears) else None
        if chosen and declined is not None:
            raise VortexInputError(
                f"The kernels that add LoRAs do not run here: {declined}. Update torch and the NVIDIA driver, or draw "
                "without LoRAs."
            )
        for file, _ in chosen:
            if file.refused:
                key, why = next(iter(file.refused.items()))
                more = f", and {len(file.refused) - 1} more" if len(file.refused) > 1 else ""
                raise VortexCheckpointError(f"{file.path} cannot be used: {key}: {why}{more}.", path=file.path)
            for part, what in file.parts.items():
                known = self._modules.get(part, {})
                strange = sorted(name for name in _names(what) if name not in known)
                if strange:
                    raise VortexCheckpointError(f"{file.path} changes {strange[0]}, which this model does not have.")
                packed = {name for name, module in known.items() if isinstance(module, NF4Linear)}
                dense = sorted(what.whole() & packed)
                if dense:
                    raise VortexCheckpointError(
                        f"{file.path} changes {len(dense)} weights as a whole, such as {dense[0]}: that is no low-rank "
                        "update, and cannot be added to 4-bit weights."
                    )

    @cached_property
    def _modules(self) -> dict[str, dict[str, nn.Module]]:
        """The modules of each part by canonical name."""
        return {
            part: {prefix + path: child for module, prefix in named for path, child in module.named_modules()}
            for part, named in self._model.modules.items()
        }

    @cached_property
    def _linears(self) -> dict[WeightGroup, list[NF4Linear]]:
        """The NF4 linears of each group."""
        return {
            group: [part for module in group.modules for part in module.modules() if isinstance(part, NF4Linear)]
            for group in self._model.groups
        }

    # --- factors --------------------------------------------------------------------------------------------------

    def _attach(
        self, wanted: dict[NF4Linear, list[list[LowRank]]], changed: Sequence[WeightGroup], gains: Gains
    ) -> None:
        """Give each linear its factors; the groups whose shapes change are laid out anew."""
        for linear, (absmax, _) in self._gains.items():
            linear.absmax.copy_(absmax)
        self._gains, self._wanted = gains, wanted
        self._owners = torch.tensor(
            [file for linear, updates in wanted.items() for file in owners(updates, linear.shape[0])], dtype=torch.int64
        )
        for group in self._model.groups:
            self._fill(group, wanted, anew=group in changed)

    def _updates(self, chosen: Chosen, gains: Gains) -> dict[NF4Linear, list[list[LowRank]]]:
        """The updates of each linear that has any, by file, in host memory. DoRA's gains go to `gains`."""
        found: dict[NF4Linear, list[list[LowRank]]] = {}
        for part in ("transformer", "t5"):
            for name, linear in self._modules[part].items():
                if isinstance(linear, NF4Linear):
                    updates = [
                        self._of_file(file.parts.get(part), name, linear, i, gains)
                        for i, (file, _) in enumerate(chosen)
                    ]
                    if any(updates):
                        found[linear] = updates
        return found

    def _of_file(self, what: LoraPart | None, name: str, linear: NF4Linear, file: int, gains: Gains) -> list[LowRank]:
        if what is None:
            return []
        updates = list(what.updates.get(name, ()))
        if name in what.inputs or name in what.row_scales:
            absmax = self._gains[linear][0] if linear in self._gains else linear.absmax  # as it was
            packed = NF4Weight(linear.packed.to(self._device), absmax.to(self._device))
            weight = dequantize(packed, torch.float32)
            updates += [_at_home(one.of(weight)) for one in what.inputs.get(name, ())]
            if name in what.row_scales:
                _, several = gains.setdefault(linear, (absmax.cpu().clone(), [None] * MOST))
                several[file], updates = _with_gains(what.row_scales[name], updates, weight)
        return updates

    def _resize(self, wanted: Mapping[NF4Linear, list[list[LowRank]]]) -> list[WeightGroup]:
        """Plan for the new factors, before any is made; the groups whose layout changes."""
        changed = [
            group
            for group, linears in self._linears.items()
            if any(
                _extent(linear) != (extent(wanted[linear], linear.shape[0]) if linear in wanted else None)
                for linear in linears
            )
        ]
        if not changed:
            return []
        nowhere = torch.device("meta")
        before = {linear: linear.adapter for group in changed for linear in self._linears[group]}
        for linear in before:
            linear.adapt(self._made(linear, wanted[linear], nowhere) if linear in wanted else None)
        sizes = self._model.measure()
        for linear, adapter in before.items():
            linear.adapt(adapter)
        for group in changed:
            group.measure()
        self._memory.resize(sizes)
        return changed

    def _fill(self, group: WeightGroup, wanted: Mapping[NF4Linear, list[list[LowRank]]], *, anew: bool) -> None:
        for linear in self._linears[group]:
            made = self._made(linear, wanted[linear], self._device) if linear in wanted else None
            kept = linear.adapter
            if anew:
                linear.adapt(made)
            elif made is not None and kept is not None:
                for place, factor in zip(kept, made, strict=True):
                    place.copy_(factor)
        if anew:
            self._memory.placement.relayout([group])

    def _fall_back(self) -> None:
        """After an error half-way: no LoRA at all."""
        self._memory.release()
        for linear, (absmax, _) in self._gains.items():
            linear.absmax.copy_(absmax)
        self.chosen, self.at_prompt_time, self._wanted, self._gains = (), (), {}, {}
        self._owners = self._owners[:0]
        for group in self._model.groups:
            for linear in self._linears[group]:
                linear.adapt(None)
            if self._linears[group]:  # each: it is not known how far they got
                self._memory.placement.relayout([group])
        self._memory.resize(self._model.measure())
        self._write((), {linear for linears in self._linears.values() for linear in linears})
        self._whole = True

    def _made(self, linear: NF4Linear, updates: Sequence[Sequence[LowRank]], device: torch.device) -> Adapter:
        exact = linear.precision.operand is None
        return adapter_of(updates, linear.shape, device, self._factor_type if exact else torch.float16)

    # --- what is written in place ---------------------------------------------------------------------------------

    def _write(self, chosen: Chosen, touched: set[NF4Linear]) -> None:
        """What depends on strengths: of ranks, gains, biases, norms, plain weights; in 8 bits the scales of rows.

        `touched`: the NF4 linears that are or were changed.
        """
        strengths = [strength for _, strength in chosen]
        self._write_scales(strengths)
        for linear, (absmax, gains) in self._gains.items():
            rows = torch.ones(len(absmax))
            for strength, gain in zip(strengths, gains, strict=False):
                rows = rows if gain is None else rows + strength * gain
            linear.absmax.copy_(absmax * rows[:, None])
        self._write_plain(chosen)
        for group, linears in self._linears.items():
            scaled = [linear for linear in linears if linear.row_scale is not None and linear in touched]
            if scaled:
                with group.visiting(self._device):
                    for linear in scaled:
                        linear.rescale()

    def _write_scales(self, strengths: Sequence[float]) -> None:
        """All in one copy to the card, since there are hundreds of them."""
        values = torch.tensor([*strengths, 0.0])[self._owners]
        scales = [linear.scale for linear in self._wanted if linear.scale is not None]
        for device in {scale.device for scale in scales}:
            parts = values.to(device).split([scale.numel() for scale in scales])
            here = [(scale, part) for scale, part in zip(scales, parts, strict=True) if scale.device == device]
            torch._foreach_copy_([scale for scale, _ in here], [part.view_as(scale) for scale, part in here])

    def _write_plain(self, chosen: Chosen) -> None:
        changes: dict[Plain, list[tuple[LoraPart, float]]] = {place: [] for place in self._originals}
        for file, strength in chosen:
            for part, what in file.parts.items():
                for name, kind in _tensors(what, self._modules[part]):
                    changes.setdefault((part, name, kind), []).append((what, strength))
        for (part, name, kind), several in changes.items():
            parameter = getattr(self._modules[part][name], kind)
            if (part, name, kind) not in self._originals:
                self._originals[part, name, kind] = parameter.detach().to("cpu", copy=True)
            original = self._originals[part, name, kind]
            value = original.float()
            for what, strength in several:
                value = value + strength * _delta(what, name, kind, original)
            parameter.copy_(value)
            if not several:
                del self._originals[part, name, kind]


def _acts_early(file: LoraFile) -> bool:
    return any(acts_at_prompt_time(part, name) for part, what in file.parts.items() for name in _names(what))


def _need_weights(chosen: Chosen) -> bool:
    return any(part.inputs or part.row_scales for file, _ in chosen for part in file.parts.values())


def _at_home(update: LowRank) -> LowRank:
    return LowRank(update.rows, update.up.cpu(), update.down.cpu())


def _with_gains(
    scales: Sequence[Magnitude], updates: Sequence[LowRank], weight: Tensor
) -> tuple[Tensor, list[LowRank]]:
    """DoRA: a gain for each row of the weight, less 1, which absmax takes; and updates, whose `up` takes it.

    `weight` becomes the merged one.
    """
    gains = torch.ones(len(weight), device=weight.device)
    for one in updates:
        weight[one.rows].addmm_(one.up.to(weight), one.down.to(weight))
    for scale in scales:
        gains[scale.rows] = scale.gains(weight).flatten()
    gains = gains.cpu()
    return gains - 1, [LowRank(one.rows, one.up.float() * gains[one.rows, None], one.down) for one in updates]


def _tensors(what: LoraPart, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """The tensors that are not NF4 and change: their modules and names."""
    others = {*what.norms, *what.modules()}
    for name in {*others, *what.biases}:
        for kind, _ in modules[name].named_parameters(recurse=False):
            if name in (what.biases if kind == "bias" else others):
                yield name, kind


def _delta(what: LoraPart, name: str, kind: str, original: Tensor) -> Tensor:
    if kind == "bias":
        return what.biases[name].float()
    return what.norms[name].delta(original) if name in what.norms else what.delta(name, original)


def _names(what: LoraPart) -> set[str]:
    return {*what.modules(), *what.biases, *what.norms}


def _extent(linear: NF4Linear) -> tuple[int, ...] | None:
    """As `low_rank.extent`, of the adapter that it has."""
    return None if linear.scale is None else tuple(linear.scale.shape)
