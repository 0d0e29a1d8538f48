"""What a LoRA file changes in canonical matrices: the data, and its meaning in plain torch.

Legend: W `[N, K]` a canonical matrix, r a rank, s a strength. **Everything is linear in s**: `W' = W + s * D(W)`, and D
does not depend on s. `delta` computes D in fp32, and is the reference. What D takes beside the file:

| field of `LoraPart` | from | D, in its rows |
|---|---|---|
| `updates` | LoRA, small LoHa and LoKr, GLoRA's B | `up @ down` |
| `inputs` | GLoRA's A | `W @ up @ down`; with W at hand it is an update: `LowRankInput.of` |
| `dense` | `diff`, large LoHa and LoKr | a whole matrix, kept as its factors |
| `rotations` | OFT, BOFT | `R(W) - W`, a whole matrix |
| `row_scales` | DoRA | see `Magnitude` |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

OUTPUT, INPUT = "output", "input"
EPSILON = torch.finfo(torch.float32).eps
NOTHING = 1e-8  # keeps the constraint of a rotation from dividing by zero


@dataclass(frozen=True, slots=True)
class LowRank:
    """`W[rows] += s * up @ down`. `up` `[rows, r]` with alpha / rank in it, `down` `[r, K]`, each in its own type."""

    rows: slice
    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]

    def delta(self) -> Tensor:
        """D of its rows, in fp32."""
        return self.up.float() @ self.down.float()


@dataclass(frozen=True, slots=True)
class LowRankInput:
    """GLoRA's A: `W[rows] += s * W[rows] @ up @ down`. `up` `[K, r]` with alpha / rank in it, `down` `[r, K]`.

    W is the matrix without any LoRA.
    """

    rows: slice
    up: Tensor
    down: Tensor

    def of(self, weight: Tensor) -> LowRank:
        """The update for a matrix `weight` `[N, K]`: one product with K x r."""
        return LowRank(self.rows, weight[self.rows].float() @ self.up.to(weight.device, torch.float32), self.down)


@dataclass(frozen=True, slots=True)
class Full:
    """`W[rows] += s * scale * weight`."""

    rows: slice
    weight: Tensor
    scale: float = 1.0

    def delta(self) -> Tensor:
        """D of its rows, in fp32."""
        return self.weight.float() * self.scale


@dataclass(frozen=True, slots=True)
class Hadamard:
    """`W[rows] += s * scale * (up @ down) * (up_2 @ down_2)`: a LoHa whose rank r^2 would be too large."""

    rows: slice
    up: Tensor
    down: Tensor
    up_2: Tensor
    down_2: Tensor
    scale: float = 1.0

    def delta(self) -> Tensor:
        """D of its rows, in fp32."""
        return (self.up.float() @ self.down.float()) * (self.up_2.float() @ self.down_2.float()) * self.scale


@dataclass(frozen=True, slots=True)
class Kronecker:
    """`W[rows] += s * scale * kron(left, right)`: a LoKr whose second factor is whole."""

    rows: slice
    left: Tensor
    right: Tensor
    scale: float = 1.0

    def delta(self) -> Tensor:
        """D of its rows, in fp32."""
        return torch.kron(self.left.float(), self.right.float()) * self.scale


Dense = Full | Hadamard | Kronecker


@dataclass(frozen=True, slots=True)
class Rotation:
    """OFT and BOFT: `W[rows] += s * (rescale * R(W[rows]) - W[rows])`, R orthogonal and made of blocks along the rows.

    `blocks` `[k, b, b]` (OFT) or `[stages, k, b, b]` (BOFT, butterflies) hold Q of Cayley's R = (I + Q)(I - Q)^-1,
    before it is made skew. `limit` bounds the norm of Q; 0: no bound. As in LyCORIS at s = 1; for other strengths it
    blends BOFT and `rescale` differently.
    """

    rows: slice
    blocks: Tensor
    rescale: Tensor | None = None
    limit: float = 0.0

    def delta(self, weight: Tensor) -> Tensor:
        """D of its rows, in fp32."""
        before = weight[self.rows].float()
        skew = self.blocks.float() - self.blocks.float().transpose(-1, -2)
        norm = float(skew.norm()) + NOTHING
        if 0 < self.limit < norm:
            skew = skew * (self.limit / norm)
        one = torch.eye(skew.shape[-1])
        turns = (one + skew) @ torch.linalg.inv(one - skew)
        after = _butterflies(turns, before) if turns.ndim == 4 else _blocks(turns, before)
        return (after if self.rescale is None else after * self.rescale.float().view(-1, 1)) - before


def _blocks(turns: Tensor, weight: Tensor) -> Tensor:
    k, b, _ = turns.shape
    return torch.einsum("knm,knx->kmx", turns, weight.view(k, b, -1)).reshape(weight.shape)


def _butterflies(turns: Tensor, weight: Tensor) -> Tensor:
    """Stage i turns rows that lie 2^i * b / 2 apart together."""
    size = turns.shape[-1]
    for stage, turn in enumerate(turns):
        apart = 2**stage * size // 2
        mixed = weight.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        mixed = torch.einsum("bij,bjx->bix", turn, mixed).flatten(0, 1)
        weight = mixed.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return weight


@dataclass(frozen=True, slots=True)
class Magnitude:
    """DoRA: the norms m that rows (or columns) of `V = W + D` should have, D what the file does else, at s = 1.

    Output axis, `values` `[rows]`: `g = m / |V_i|` for each row i, and `W'_i = W_i + s * (g_i V_i - W_i)`, that is
    `W'_i = (1 - s + s g_i) W_i + s g_i D_i`: a scale of the row, which fits absmax exactly, and an update whose `up` is
    scaled by g. Input axis, `values` `[K]`: the same for columns, whose norms are taken over `rows`. It is no row scale
    and needs a whole matrix. g does not depend on s. |V| is as DoRA's paper, PEFT and LyCORIS have it; ComfyUI takes
    |W| on the output axis.
    """

    rows: slice
    values: Tensor
    axis: Literal["output", "input"]

    def gains(self, merged: Tensor) -> Tensor:
        """g as a column `[rows, 1]` or a row `[1, K]`, for V = `merged` `[N, K]` in fp32."""
        dim = 1 if self.axis == OUTPUT else 0
        norms = merged[self.rows].norm(dim=dim, keepdim=True) + EPSILON
        return self.values.to(norms).view(norms.shape) / norms


@dataclass(frozen=True, slots=True)
class NormChange:
    """The scale of a norm, w: `w + s * values`, or if `replaces`, `w + s * (values - w)`. `values` `[C]`."""

    values: Tensor
    replaces: bool = False

    def delta(self, scale: Tensor) -> Tensor:
        """What s is multiplied with, in fp32."""
        values = self.values.to(scale.device, torch.float32)
        return values - scale.float() if self.replaces else values


@dataclass(frozen=True, slots=True)
class LoraPart:
    """What a file changes in one part of the model, by canonical module (`double_blocks.0.img_attn.qkv`).

    Of a file with split q, k and v, each has an update of its own rows; updates of one matrix whose `down` are equal
    are merged to one. So the rows of a matrix's updates are disjoint, in order, and need not cover it. `biases` `[N]`
    in fp32 are added times s; rows that the file does not touch are 0. `norms` have the module's name, such as
    `double_blocks.0.img_attn.norm.query_norm`; the bias of a LayerNorm is in `biases`.
    """

    updates: dict[str, tuple[LowRank, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[LowRankInput, ...]] = field(default_factory=dict)
    dense: dict[str, tuple[Dense, ...]] = field(default_factory=dict)
    rotations: dict[str, tuple[Rotation, ...]] = field(default_factory=dict)
    row_scales: dict[str, tuple[Magnitude, ...]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, NormChange] = field(default_factory=dict)

    def modules(self) -> set[str]:
        """Every matrix that is changed."""
        return {*self.updates, *self.inputs, *self.dense, *self.rotations, *self.row_scales}

    def whole(self) -> set[str]:
        """The matrices whose D has no low rank, not even with a scale of rows: they need a 16-bit copy."""
        columns = {name for name, scales in self.row_scales.items() if any(one.axis == INPUT for one in scales)}
        return {*self.dense, *self.rotations} | columns

    def rank(self, module: str) -> int:
        """The rank of a matrix's updates side by side: the sum over them, as if they were block-diagonal."""
        parts: list[LowRank | LowRankInput] = [*self.updates.get(module, ()), *self.inputs.get(module, ())]
        return sum(part.down.shape[0] for part in parts)

    def delta(self, module: str, weight: Tensor) -> Tensor:
        """D `[N, K]` in fp32 for the matrix `weight` `[N, K]`. The reference: a whole matrix, on the CPU."""
        weight = weight.float()
        total = torch.zeros_like(weight)
        for rows, change in self._changes(module, weight):
            total[rows] += change
        merged = weight + total
        for one in self.row_scales.get(module, ()):
            total[one.rows] = merged[one.rows] * one.gains(merged) - weight[one.rows]
        return total

    def _changes(self, module: str, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for update in (*self.updates.get(module, ()), *(one.of(weight) for one in self.inputs.get(module, ()))):
            yield update.rows, update.delta()
        for dense in self.dense.get(module, ()):
            yield dense.rows, dense.delta()
        for rotation in self.rotations.get(module, ()):
            yield rotation.rows, rotation.delta(weight)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What one file says, in canonical names and host memory.

    `parts`: `transformer`, `t5`, `clip`. `refused` and `ignored` say why, by the file's own keys: what Vortex cannot
    apply, and what has no effect on FLUX.1-schnell. `kind` is the format in words, `ranks` the distinct ranks in the
    file (of factors, before LoHa and LoKr multiply them), `nbytes` the file's size. `token` equals that of no other
    reading: caches know the file by it, as the path may hold another file later.
    """

    path: str
    kind: str
    parts: dict[str, LoraPart]
    refused: dict[str, str]
    ignored: dict[str, str]
    ranks: tuple[int, ...]
    nbytes: int
    token: object = field(default_factory=object, compare=False, repr=False)
