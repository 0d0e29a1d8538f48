"""Fill modules that were built on `meta`: linears become NF4 where asked, everything else takes its tensor as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import nf4
from ..errors import VortexCheckpointError
from ..linear import Backend, NF4Linear
from ..nf4 import NF4Weight
from .tensors import Tensors

# Embedders and the last projection are small, and their error would reach every token: they stay unquantized.
UNQUANTIZED = ("img_in", "txt_in", "time_in", "vector_in", "final_layer.linear")


@dataclass(frozen=True, slots=True)
class Target:
    """How weights are to arrive: computed on `device` in `dtype`, quantized for `backend` (None: not at all).

    `progress(nbytes)` is told what was read.
    """

    device: torch.device
    dtype: torch.dtype
    backend: Backend | None
    progress: Callable[[int], None] = lambda nbytes: None


def check(module: nn.Module, tensors: Tensors, prefix: str = "", *, scales: bool = True) -> int:
    """Compare names, types and shapes with the headers; the bytes that will be read.

    Takes no memory, and reads nothing but, with `scales`, those of NF4 weights, for NaN and infinity. Raises
    `VortexCheckpointError` naming the first tensors that are missing or of another type or shape.
    """
    total = 0
    missing, other = [], []
    for name, parameter in module.named_parameters(prefix=prefix.rstrip(".")):
        if name not in tensors:
            missing.append(name)
        elif _squeezed(tensors.shape(name)) != _squeezed(tuple(parameter.shape)):
            other.append(f"{name}: expected {tuple(parameter.shape)}, found {tensors.shape(name)}")
        else:
            tensors.check(name, scales=scales)
            total += tensors.nbytes(name)
    if missing:
        raise VortexCheckpointError(
            f"{tensors.where} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}. "
            "It is another model, or the download is incomplete: run it again.",
            path=tensors.where,
        )
    if other:
        raise VortexCheckpointError(
            f"{tensors.where} does not fit together: {'; '.join(other[:3])}. Download it again.",
            path=tensors.where,
        )
    return total


def materialize(
    module: nn.Module, tensors: Tensors, target: Target, *, prefix: str = "", home: torch.device | None = None
) -> nn.Module:
    """Fill `module` (built on `meta`) from `tensors`, names prefixed with `prefix`, tensor by tensor; returns it.

    Quantization runs on `target.device`; the results stay on `home` (default: there too). What is NF4 already goes
    straight home; on the CPU it stays in the mapped file. Host memory holds about one tensor at a time.
    """
    home = home or target.device
    for path, child in list(module.named_modules()):
        name = prefix + path
        if target.backend is not None and is_quantized(child, name):
            weight = read_nf4(tensors, f"{name}.weight", target, home)
            bias = None if child.bias is None else _read(tensors, f"{name}.bias", target, home)
            module.set_submodule(path, NF4Linear(weight, bias, target.backend))
    for path, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue  # filled before, perhaps with another home
        owner = module.get_submodule(path.rpartition(".")[0])
        tensor = _read(tensors, prefix + path, target, home).view(parameter.shape)
        setattr(owner, path.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return module


def is_quantized(module: nn.Module, name: str, unquantized: tuple[str, ...] = UNQUANTIZED) -> bool:
    """Whether the module of this canonical name is a linear whose weight becomes NF4."""
    return isinstance(module, nn.Linear) and not name.startswith(unquantized)


def read_nf4(tensors: Tensors, name: str, target: Target, home: torch.device) -> NF4Weight:
    """A weight in NF4 on `home`: as it is where the source has it, else quantized on the target's device."""
    if tensors.is_nf4(name):
        weight = tensors.read_nf4(name, home)
    else:
        values = tensors.read(name, target.device)
        if values.dtype == torch.float64:
            values = values.float()  # bitsandbytes takes 16 and 32 bits
        try:
            weight = nf4.quantize(values, name).to(home)
        except VortexCheckpointError as error:
            raise VortexCheckpointError(f"{tensors.where}: {error}", path=tensors.where) from error
    target.progress(tensors.nbytes(name))
    return weight


def _read(tensors: Tensors, name: str, target: Target, home: torch.device) -> Tensor:
    # on the CPU a copy, so that a plain tensor does not hold on to the mapped file
    tensor = tensors.read(name, home).to(dtype=target.dtype, copy=home.type == "cpu")
    target.progress(tensors.nbytes(name))
    return tensor


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    # the VAE's 1x1 convolutions are linears in Vortex and in diffusers, but not in BFL's file
    return shape[:2] if shape[2:] == (1, 1) else shape
