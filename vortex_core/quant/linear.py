"""A linear in NF4: dequantize the weight into memory that all layers share, then the library's product.

FLUX multiplies hundreds of tokens at once. There bitsandbytes' 4-bit product also dequantizes the whole weight first,
into fresh memory each time. Memory that every layer reuses gives the same numbers, and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Adapter, ScaledTensor
from ..memory.arena import Shape
from ..nf4 import BLOCK, NF4Weight
from .backends import Backend
from .precision import EXACT, Precision

FACTORS = Adapter._fields


class NF4Linear(nn.Module):
    """`x @ W.T + b` with W in NF4. `x` `[..., K]` in any float type, which is also the type of the product.

    The buffers are `packed` and `absmax`, and in 8 bits `row_scale`. `weight` is None: transformers' T5 casts its input
    to `wo.weight.dtype`, and a packed weight would make that integers. `precision` is that of `multiply`.
    """

    weight = None
    packed: Tensor
    absmax: Tensor
    row_scale: Tensor | None
    up: Tensor | None
    down: Tensor | None
    part: Tensor | None
    scale: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None, backend: Backend) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("row_scale", None)
        for name in FACTORS:  # buffers, so that they move with the weight
            self.register_buffer(name, None)
        self._copy: Tensor | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.backend = backend
        self.precision: Precision = EXACT

    @classmethod
    def like(cls, linear: nn.Linear, backend: Backend) -> NF4Linear:
        """The NF4 linear for `linear`, on `meta` like it; `fill` brings the weight."""
        n, k = linear.weight.shape
        packed = torch.empty(n, k // 2, dtype=torch.uint8, device="meta")
        return cls(NF4Weight(packed, torch.empty(n, k // BLOCK, device="meta")), linear.bias, backend)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the weight."""
        return NF4Weight(self.packed, self.absmax).shape

    def fill(self, weight: NF4Weight) -> None:
        """Take the weight, and find its scales again if there were some."""
        self.packed, self.absmax = weight.packed, weight.absmax
        self.use(self.precision)

    def use(self, precision: Precision) -> None:
        """Multiply in `precision`. In 8 bits that needs what each row of the weight is divided by: 4 bytes a row."""
        self.precision, self.row_scale, self._copy = precision, None, None
        if precision.operand is not None:
            self.row_scale = torch.empty(len(self.packed), device=self.packed.device)
            self.rescale()

    def adapt(self, adapter: Adapter | None) -> None:
        """Add an update to the weight from now on, in place of another one; None: none. In 8 bits `rescale` it then."""
        for name in FACTORS:
            setattr(self, name, None if adapter is None else getattr(adapter, name))

    @property
    def adapter(self) -> Adapter | None:
        """The update that is added to the weight, where its factors lie now."""
        if self.up is None or self.down is None or self.part is None or self.scale is None:
            return None
        return Adapter(self.up, self.down, self.part, self.scale)

    def rescale(self) -> None:
        """In 8 bits: find what each row of the weight with its update is divided by."""
        if self.row_scale is not None and not self.packed.is_meta:
            assert self.precision.operand is not None
            what = (self.row_scale, self.precision.operand)
            self.backend.row_scales(self.packed, self.absmax, *what, self.adapter)

    @property
    def packing(self) -> tuple[Tensor, ...]:
        """What a product does not need where the weight is expanded."""
        return (self.packed, self.absmax, *(self.adapter or ()))

    @property
    def decoded(self) -> Shape | None:
        """Shape and type of the weight in 8 bits; None where products are in 16."""
        return None if self.precision.operand is None else (self.shape, self.precision.operand)

    def expand(self, out: Tensor | None) -> None:
        """Decode the weight into `out`, for all products to come; None: decode it for each again."""
        if out is not None:
            self.backend.decode(self.packed, self.absmax, out, self.row_scale, self.adapter)
        self._copy = out

    def operand(self, dtype: torch.dtype, scratch: int) -> Tensor:
        """The weight `[N, K]` as `multiply` takes it; in `dtype` where products are exact."""
        if self._copy is not None:
            return self._copy
        dtype = self.precision.operand or dtype
        return self.backend.dequantize(self.packed, self.absmax, dtype, self.row_scale, scratch, self.adapter)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        weight = self.backend.dequantize(self.packed, self.absmax, x.dtype, adapter=self.adapter)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes and backend, for `print(model)`."""
        n, k = self.shape
        return f"in_features={k}, out_features={n}, backend={self.backend.name}"


def multiply(
    linear: nn.Module,
    x: ScaledTensor | list[ScaledTensor],
    out: Tensor | list[Tensor],
    scratch: int = 0,
    *,
    gelu: bool = False,
) -> None:
    """`x @ W.T + b` of an `NF4Linear` or `nn.Linear` into `out` `[B, T, N]`, with fp32 accumulation.

    `x` is `[B, T, K]`, as the linear's precision wants it (an `nn.Linear`'s is exact); `scratch` as in
    `Backend.dequantize`. A list holds parts that count as one, side by side in K or in N. Each part takes a product, as
    do pictures that do not follow each other in memory. Not with scales: several parts of `x`, which add up in `out`;
    and `gelu` (tanh form) of `out`, of its last part only.
    """
    xs, outs = [x] if isinstance(x, ScaledTensor) else x, [out] if isinstance(out, Tensor) else out
    if isinstance(linear, NF4Linear):
        precision, row_scale = linear.precision, linear.row_scale
        weight = linear.operand(xs[0].values.dtype, scratch)
    else:
        assert isinstance(linear, nn.Linear)
        precision, row_scale, weight = EXACT, None, linear.weight
    for part, rows in zip(outs, _side_by_side(outs), strict=True):
        row_scales, bias = (None if whole is None else whole[rows] for whole in (row_scale, linear.bias))
        for operand, columns in zip(xs, _side_by_side([x.values for x in xs]), strict=True):
            last = rows.stop == weight.shape[0] and columns.stop == weight.shape[1]
            for values, scale, y in _pictures(operand, part):
                addend = y if columns.start else bias
                precision.product(values, scale, weight[rows, columns], row_scales, addend, y, gelu=gelu and last)


def _side_by_side(parts: list[Tensor]) -> Iterator[slice]:
    """The slice of each part in the last dimension of the whole."""
    stop = 0
    for part in parts:
        start, stop = stop, stop + part.shape[-1]
        yield slice(start, stop)


def _pictures(x: ScaledTensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Values, scale and `out` of all pictures at once if they follow each other in memory, else of each."""
    if _follow_each_other(x.values) and _follow_each_other(out) and (x.scale is None or x.scale.is_contiguous()):
        yield x.values.flatten(0, 1), None if x.scale is None else x.scale.flatten(), out.flatten(0, 1)
    else:
        for i, picture in enumerate(out):
            yield x.values[i], None if x.scale is None else x.scale[i], picture


def _follow_each_other(x: Tensor) -> bool:
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
