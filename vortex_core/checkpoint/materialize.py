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
from .layout import UNQUANTIZED as UNQUANTIZED
from .tensors import Tensors, check_shapes


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
    """See `check_shapes`, of the parameters of a module."""
    named = module.named_parameters(prefix=prefix.rstrip("."))
    return check_shapes({name: tuple(parameter.shape) for name, parameter in named}, tensors, scales=scales)


def materialize(
    module: nn.Module, tensors: Tensors, target: Target, *, prefix: str = "", home: torch.device | None = None
) -> nn.Module:
    """Fill `module` (built on `meta`) from `tensors`, names prefixed with `prefix`, tensor by tensor; returns it.

    Quantization runs on `target.device`; the results stay on `home` (default: there too). What is NF4 already goes
    straight home. Host memory holds about one tensor at a time. What is not finite on a GPU shows in `Tensors.settle`.
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
    tensor = tensors.read(name, home).to(target.dtype)
    target.progress(tensors.nbytes(name))
    return tensor
