"""From a method's factors to factors or whole matrices of an update. Plain torch, in host memory.

Legend: N rows, K columns, r a rank. Products are exact in what they say; sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp

import torch
from torch import Tensor

from ..quant.adapters import Dense, Full, Hadamard, Kronecker, LowRank, LowRankInput, Rotation
from .lora_layers import Layer, is_old_glora, trimmed
from .lora_places import Place

Tensors = Mapping[str, Tensor]  # by role


def low_rank(one: Layer, tensors: Tensors, scale: float) -> LowRank:
    """A LoRA as it is; LoHa by products of columns and rows; LoKr by Kronecker products of its factors."""
    up, down = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr}[one.method](tensors)
    return LowRank(one.place.rows, swapped(times(up, scale), one.place), down.contiguous())


def dense(one: Layer, tensors: Tensors, scale: float) -> Dense:
    """A whole update, as its factors."""
    rows = one.place.rows
    update: Dense
    if one.method == "LoHa":
        (up, down), (up_2, down_2) = (_hada(tensors, number) for number in (1, 2))
        update = Hadamard(rows, swapped(up, one.place), down, swapped(up_2, one.place), down_2, scale)
    elif one.method == "LoKr":
        left, right = (_whole_side(tensors, number) for number in (1, 2))
        update = Kronecker(rows, left, right, scale)
        if one.place.swapped:
            update = Full(rows, swapped(update.delta(), one.place))
    else:
        update = Full(rows, swapped(tensors["diff"], one.place), scale)
    return update


def low_rank_input(one: Layer, tensors: Tensors, scale: float) -> tuple[LowRankInput, LowRank]:
    """GLoRA's A, which takes W, and its B, which does not."""
    a1, a2, b1, b2 = (tensors[role] for role in ("a1", "a2", "b1", "b2"))
    if is_old_glora({role: tuple(tensor.shape) for role, tensor in tensors.items()}):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rows = one.place.rows
    return LowRankInput(rows, times(a1, scale), a2), LowRank(rows, swapped(times(b1, scale), one.place), b2)


def rotation(one: Layer, tensors: Tensors, constraint: float) -> Rotation:
    """OFT's or BOFT's blocks. LyCORIS stores the bound of Q's norm a row."""
    blocks, rescale = tensors["blocks"], tensors.get("rescale")
    if one.place.swapped:
        blocks = torch.cat(blocks.chunk(2)[::-1])  # of an even number, as the header's check says
        rescale = None if rescale is None else swapped(rescale, one.place)
    return Rotation(one.place.rows, blocks, None if rescale is None else rescale.view(-1), constraint * one.place.count)


def swapped(rows: Tensor, place: Place) -> Tensor:
    """`rows` with halves changed where the place wants that."""
    return torch.cat(rows.chunk(2)[::-1]) if place.swapped else rows.contiguous()


def times(tensor: Tensor, scale: float) -> Tensor:
    """`tensor * scale`, exact in the tensor's type or in fp32."""
    if scale == 1.0:
        return tensor
    if frexp(scale)[0] == 0.5 and tensor.dtype != torch.float16:  # a power of two; fp16 has few exponents
        return tensor * scale
    return tensor.float() * scale


def bias_of(one: Layer, tensors: Tensors, scale: float) -> Tensor:
    """The biases that a layer adds to its rows, in fp32."""
    total = torch.zeros(one.place.count)
    if "diff_b" in tensors:
        total += tensors["diff_b"].float().view(-1)
    if "up_bias" in tensors:
        total += tensors["up_bias"].float().view(-1) * scale
    return swapped(total, one.place)


def rank_of_alpha(one: Layer, tensors: Tensors) -> int | None:
    """What alpha is divided by; None where the method takes no alpha."""
    last = {"LoRA": "down", "LoHa": "w1_b"}.get(one.method)
    if last is not None:
        return tensors[last].shape[0]
    if one.method == "LoKr":  # the second side's rank counts where both have one
        return next((tensors[role].shape[0] for role in ("k2_b", "k1_b") if role in tensors), None)
    return one.rank if one.method == "GLoRA" else None


def _lora(tensors: Tensors) -> tuple[Tensor, Tensor]:
    up, down = tensors["up"], tensors["down"]
    return up, tensors["mid"].float() @ down.float() if "mid" in tensors else down


def _hada(tensors: Tensors, number: int) -> tuple[Tensor, Tensor]:
    first, second, core = (tensors.get(role) for role in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    assert first is not None
    assert second is not None
    return _tucker(first, second, core)


def _tucker(first: Tensor, second: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors `[N, r]` and `[r, K]`; Tucker's are stored `[r, N]`, with a core between them."""
    return (first, second) if core is None else (first.T.contiguous(), core.float() @ second.float())


def _loha(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """`(u1 d1) * (u2 d2)`: its up is each row's products of u1 and u2, its down each column's of d1 and d2."""
    (up, down), (up_2, down_2) = (_hada(tensors, number) for number in (1, 2))
    wide = (up.float()[:, :, None] * up_2.float()[:, None, :]).flatten(1)
    return wide, (down.float()[:, None, :] * down_2.float()[None, :, :]).flatten(0, 1)


def _lokr(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """`kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)`."""
    (up, down), (up_2, down_2) = (_side(tensors, number) for number in (1, 2))
    return torch.kron(up.float(), up_2.float()), torch.kron(down.float(), down_2.float())


def _side(tensors: Tensors, number: int) -> tuple[Tensor, Tensor]:
    """One side of LoKr as two factors of the least rank; a whole one beside a unit matrix."""
    whole = tensors.get(f"k{number}")
    if whole is None:
        up, down = _factors(tensors, number)
        if up.shape[1] <= min(up.shape[0], down.shape[1]):
            return up, down
        whole = up.float() @ down.float()
    n, k = whole.shape
    return (whole, torch.eye(k)) if k <= n else (torch.eye(n), whole)


def _whole_side(tensors: Tensors, number: int) -> Tensor:
    whole = tensors.get(f"k{number}")
    if whole is None:
        up, down = _factors(tensors, number)
        whole = up.float() @ down.float()
    return whole.contiguous()


def _factors(tensors: Tensors, number: int) -> tuple[Tensor, Tensor]:
    core = tensors.get("kt") if number == 2 else None
    return _tucker(tensors[f"k{number}_a"], tensors[f"k{number}_b"], core)


def flat(tensor: Tensor) -> Tensor:
    """A matrix that is stored as a 1x1 convolution, as a matrix."""
    return tensor.view(trimmed(tuple(tensor.shape)))
