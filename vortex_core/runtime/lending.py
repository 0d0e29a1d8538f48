"""An engine's weights, lent to code that is not ours: one product at a time, on the engine's thread, within its budget.

The code brings its own activations. A weight is dequantized for each product, in 16 bits whatever the engine's mode is.
Blocks that stream are copied to the device when the first of their weights is asked for, and the block after them, too;
weights of prompt time that are in host memory are copied for each product.
"""

from __future__ import annotations

from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn

from ..flux1.spec import MODULATION_ROWS, FluxSpec
from ..kernels import Adapter
from ..memory.offload import Prefetcher
from ..quant.linear import NF4Linear
from .model import Model


class Lent:
    """The transformer's and modulation's weights while they are lent, by canonical name (`double_blocks.0.img_mod`)."""

    def __init__(self, model: Model, prefetcher: Prefetcher) -> None:
        self._model, self._prefetcher = model, prefetcher
        self._streams = {id(part): k for k, group in enumerate(prefetcher.groups) for part in _parts(group.modules)}

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for module in (self._model.transformer, self._model.modulation)
                for name, part in module.named_modules()}  # fmt: skip

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x` `[..., K]` times the linear of that name, with its bias: `[..., N]`, in the type of `x`."""
        linear = self._at_hand(name)
        assert isinstance(linear, NF4Linear | nn.Linear)
        bias = None if linear.bias is None else linear.bias.to(x)
        if isinstance(linear, nn.Linear):
            return F.linear(x, linear.weight.to(x), bias)
        packed, absmax = (tensor.to(x.device, non_blocking=True) for tensor in (linear.packed, linear.absmax))
        adapter = linear.adapter
        if adapter is not None:
            adapter = Adapter(*(factor.to(x.device, non_blocking=True) for factor in adapter))
        return F.linear(x, linear.backend.dequantize(packed, absmax, x.dtype, adapter=adapter), bias)

    def norm(self, name: str) -> Tensor:
        """The weight of the norm of that name."""
        scale = self._at_hand(name).scale
        assert isinstance(scale, Tensor)
        return scale

    def _at_hand(self, name: str) -> nn.Module:
        module = self._modules[name]
        k = self._streams.get(id(module))
        if k is not None:
            self._prefetcher.bring(k)
        return module


def modulation_rows(spec: FluxSpec) -> dict[str, slice]:
    """The rows of a modulation table that each modulation linear gives, by its canonical name."""
    depths = {"double_blocks": spec.double_blocks, "single_blocks": spec.single_blocks}
    found: dict[str, slice] = {}
    start = 0
    for kind, linears in MODULATION_ROWS.items():
        for prefix in [f"{kind}.{i}" for i in range(depths[kind])] if kind in depths else [kind]:
            for name, rows in linears.items():
                found[f"{prefix}.{name}"] = slice(start, start + rows)
                start += rows
    return found


def _parts(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    return [part for module in modules for part in module.modules()]
