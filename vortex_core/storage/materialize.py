"""Fills modules that were built on `meta`: linears become NF4, every other part takes its tensor as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import nf4
from ..errors import VortexCheckpointError
from ..nf4 import UNQUANTIZED, NF4Weight
from ..quant.backends import Backend
from ..quant.linear import NF4Linear
from .tensors import Tensors, check_shapes


@dataclass(frozen=True, slots=True)
class Target:
    """The `device` that quantizes weights, and the `dtype` of other tensors. `progress(nbytes)` gets what was read."""

    device: torch.device
    dtype: torch.dtype
    progress: Callable[[int], None] = lambda nbytes: None


def pack(module: nn.Module, prefix: str, backend: Backend) -> None:
    """Replace linears of a module on `meta` by NF4 linears, where `is_quantized`; `prefix` of canonical names."""
    for path, child in list(module.named_modules()):
        if is_quantized(child, prefix + path):
            assert isinstance(child, nn.Linear)
            module.set_submodule(path, NF4Linear.like(child, backend))


def shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that fill a module, by canonical name; for NF4 those of the whole matrices."""
    start = prefix.rstrip(".")
    found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(prefix=start)}
    linears = ((name, part) for name, part in module.named_modules(prefix=start) if isinstance(part, NF4Linear))
    return found | {f"{name}.weight": part.shape for name, part in linears}


def check(module: nn.Module, tensors: Tensors, prefix: str = "", *, scales: bool = True) -> int:
    """Do `check_shapes` for the tensors that fill a module."""
    return check_shapes(shapes(module, prefix), tensors, scales=scales)


def materialize(
    module: nn.Module, tensors: Tensors, target: Target, *, prefix: str = "", home: torch.device | None = None
) -> nn.Module:
    """Fill `module` (built on `meta`) from `tensors`, names prefixed with `prefix`, tensor by tensor; returns it.

    Quantization runs on `target.device`; results go to `home` (default: the same). Weights that are NF4 already go
    straight to `home`. Host memory holds about one tensor at a time. For what is not finite on a GPU see
    `Tensors.settle`.
    """
    home = home or target.device
    for path, child in module.named_modules():
        if isinstance(child, NF4Linear):
            child.fill(read_nf4(tensors, f"{prefix}{path}.weight", target, home))
    for path, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue  # filled before, perhaps with another home
        owner = module.get_submodule(path.rpartition(".")[0])
        tensor = _read(tensors, prefix + path, target, home).view(parameter.shape)
        setattr(owner, path.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return module


def is_quantized(module: nn.Module, name: str, unquantized: tuple[str, ...] = UNQUANTIZED) -> bool:
    """Whether the module, of this canonical name, is a linear whose weight is NF4 or becomes so."""
    return isinstance(module, nn.Linear | NF4Linear) and not name.startswith(unquantized)


def read_nf4(tensors: Tensors, name: str, target: Target, home: torch.device) -> NF4Weight:
    """A weight in NF4 on `home`: as stored, or else quantized on the target's device."""
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
    tensor = tensors.read(name, home).to(target.dtype)
    target.progress(tensors.nbytes(name))
    return tensor
