"""A LoRA whose tensors another program has read: what it changes, by canonical module and role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite

from torch import Tensor

from ..errors import VortexCheckpointError
from ..flux1.spec import ModelSpec
from ..quant.adapters import LoraFile
from ..quant.low_rank import largest
from .lora_alphas import Alphas
from .lora_factors import flat
from .lora_layers import Layer, Misfit, layer
from .lora_places import places_of
from .lora_reader import Parts, plain


@dataclass(frozen=True, slots=True)
class Change:
    """What a LoRA does to `module` of a `part`, in its `rows` (None: all): tensors by role (`lora_roles.ROLES`).

    `swapped`: its halves change places first, as diffusers' `norm_out` wants.
    """

    module: str
    tensors: Mapping[str, Tensor]
    rows: slice | None = None
    swapped: bool = False
    part: str = "transformer"


def lora_of(changes: Iterable[Change], where: str, spec: ModelSpec) -> LoraFile:
    """The LoRA of these changes, in host memory, for a model of these sizes. `where` stands for its path in words.

    Raises `VortexCheckpointError` for a module that the model does not have, sizes that do not fit, and values that
    are not finite.
    """
    parts: dict[str, Parts] = defaultdict(Parts)
    ranks, nbytes = set(), 0
    for change in changes:
        tensors = {role: flat(plain(tensor.detach().cpu())) for role, tensor in change.tensors.items()}
        for tensor in tensors.values():
            if not isfinite(largest(tensor)):
                raise VortexCheckpointError(f"{where} has values that are not finite, for {change.module}.", path=where)
            nbytes += tensor.numel() * tensor.element_size()
        one = _layer(change, tensors, where, spec)
        ranks |= {one.rank} - {None}
        parts[change.part].take(one, tensors, Alphas())
    return LoraFile(
        path=where,
        kind="read by another program",
        parts={name: part.merged() for name, part in parts.items()},
        refused={},
        ignored={},
        ranks=tuple(sorted(rank for rank in ranks if rank is not None)),
        nbytes=nbytes,
    )


def _layer(change: Change, tensors: Mapping[str, Tensor], where: str, spec: ModelSpec) -> Layer:
    place = places_of(spec).find(change.module)
    if place is None or place.part != change.part:
        raise VortexCheckpointError(f"{where} changes {change.module}, which this model does not have.", path=where)
    place = replace(place, rows=change.rows or slice(0, place.shape[0]), swapped=change.swapped)
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    try:
        one = layer(change.module, place, {role: role for role in tensors}, shapes)
    except Misfit as error:
        raise VortexCheckpointError(f"{where}: {change.module} {error}.", path=where) from error
    wanted = (place.count, 1 if place.is_norm else place.shape[1])
    found = (one.size[0], one.size[1] or wanted[1])
    if found != wanted:
        raise VortexCheckpointError(
            f"{where} does not fit this model: {change.module} is {wanted[0]} x {wanted[1]}, its update "
            f"{found[0]} x {found[1]}.",
            path=where,
        )
    return one
