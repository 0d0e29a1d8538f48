"""Reads a LoRA's tensors and makes canonical updates of them (`quant/adapters.py`)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flux1.spec import ModelSpec
from ..quant.adapters import LoraFile, LoraPart, LowRank, Magnitude, NormChange
from ..quant.low_rank import largest
from ..storage.files import Raw
from ..storage.finite_weights import Finite
from .lora_alphas import Alphas
from .lora_factors import bias_of, dense, flat, low_rank, low_rank_input, rank_of_alpha, rotation, swapped
from .lora_header import LoraHeader, open_lora
from .lora_kinds import kind_of
from .lora_layers import DENSE, INPUT, LOW, NORM, TURN, Layer, axis, trimmed

LARGE = 2**28  # bytes of a file that several threads read; those of smaller tensors would wait for each other
THREADS = 4
SCALED = ("LoRA", "LoHa", "LoKr", "GLoRA")
EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_lora(path: str | Path, spec: ModelSpec) -> LoraFile:
    """A LoRA file in canonical names, in host memory, for a model of these sizes.

    Raises `VortexCheckpointError` as `open_lora` does, and for NaN and infinity.
    """
    return read(open_lora(path, spec))


def read(header: LoraHeader) -> LoraFile:
    """The tensors of an opened LoRA."""
    parts: dict[str, Parts] = defaultdict(Parts)
    reader = _Reader(header)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        every = (pool.map if header.nbytes > LARGE else map)(reader.read, header.layers)
        for one, tensors in zip(header.layers, every, strict=True):
            parts[one.place.part].take(one, tensors, header.alphas)
    return LoraFile(
        path=header.where,
        kind=kind_of(header),
        parts={name: part.merged() for name, part in parts.items()},
        refused=dict(header.refused),
        ignored=dict(header.ignored),
        ranks=header.ranks,
        nbytes=header.nbytes,
    )


@dataclass(slots=True)
class Parts:
    """A `LoraPart` in the making: lists by module."""

    lists: dict[str, dict[str, list[Any]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, NormChange] = field(default_factory=dict)

    def add(self, what: str, module: str, change: Any) -> None:
        self.lists[what][module].append(change)

    def take(self, one: Layer, tensors: Mapping[str, Tensor], alphas: Alphas) -> None:
        """Put what `one` changes in here."""
        module = one.place.module
        scale = _scale(one, tensors, alphas)
        if one.form == LOW:
            self.add("updates", module, low_rank(one, tensors, scale))
        elif one.form == DENSE:
            self.add("dense", module, dense(one, tensors, scale))
        elif one.form == INPUT:
            before, after = low_rank_input(one, tensors, scale)
            self.add("inputs", module, before)
            self.add("updates", module, after)
        elif one.form == TURN:
            constraint = tensors["alpha"].item() if "alpha" in tensors else 0.0
            self.add("rotations", module, rotation(one, tensors, constraint))
        elif one.form == NORM:
            self.norms[module] = _norm(tensors)
        if "dora" in tensors:
            self.add("row_scales", module, _magnitude(one, tensors["dora"]))
        if not tensors.keys().isdisjoint(("diff_b", "up_bias")):
            bias = self.biases.setdefault(module, torch.zeros(one.place.shape[0]))
            bias[one.place.rows] += bias_of(one, tensors, scale)

    def merged(self) -> LoraPart:
        """In the order of rows; updates that follow each other and share a `down` become one."""
        made = {
            what: {name: tuple(sorted(changes, key=lambda one: one.rows.start)) for name, changes in modules.items()}
            for what, modules in self.lists.items()
        }
        made["updates"] = {name: _joined(updates) for name, updates in made.get("updates", {}).items()}
        return LoraPart(**made, biases=self.biases, norms=self.norms)


def _joined(updates: tuple[LowRank, ...]) -> tuple[LowRank, ...]:
    groups = [[updates[0]]]
    for before, after in pairwise(updates):
        if before.rows.stop == after.rows.start and _equal(before.down, after.down):
            groups[-1].append(after)
        else:
            groups.append([after])
    return tuple(
        group[0]
        if len(group) == 1
        else LowRank(
            slice(group[0].rows.start, group[-1].rows.stop), torch.cat([one.up for one in group]), group[0].down
        )
        for group in groups
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class _Reader:
    """Reads layers of one file."""

    def __init__(self, header: LoraHeader) -> None:
        self._raw: Raw = header.raw
        self._finite = Finite(header.where)

    def read(self, one: Layer) -> dict[str, Tensor]:
        """The tensors of `one` by role. Any thread may read."""
        return {role: self._read(key) for role, key in one.keys.items()}

    def _read(self, key: str) -> Tensor:
        tensor = plain(self._raw.read(key))
        if not isfinite(largest(tensor)):
            self._finite.watch(key, tensor)  # which says so
        return flat(tensor)


def plain(tensor: Tensor) -> Tensor:
    """A tensor in a type that updates are made of."""
    if tensor.dtype in EIGHT:
        return tensor.bfloat16()  # which holds them exactly
    return tensor.float() if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor


def _scale(one: Layer, tensors: Mapping[str, Tensor], alphas: Alphas) -> float:
    rank = rank_of_alpha(one, tensors)
    if "alpha" in tensors:
        return 1.0 if rank is None else tensors["alpha"].item() / rank
    return alphas.scale(one.stem, rank) if one.method in SCALED else 1.0


def _norm(tensors: Mapping[str, Tensor]) -> NormChange:
    if "diff" in tensors:
        return NormChange(tensors["diff"].float().view(-1))
    return NormChange(tensors["set" if "set" in tensors else "weight"].float().view(-1), replaces=True)


def _magnitude(one: Layer, values: Tensor) -> Magnitude:
    along = axis(trimmed(tuple(values.shape)), (one.place.count, one.place.shape[1]))
    values = values.float().reshape(-1)
    if along == "output":
        return Magnitude(one.place.rows, swapped(values, one.place), "output")
    return Magnitude(one.place.rows, values, "input")
