"""A linear in NF4: dequantize the weight into memory that all layers share, then the library's product.

FLUX multiplies hundreds of tokens at once. There bitsandbytes' 4-bit product also dequantizes the whole weight first,
into fresh memory each time. Memory that every layer reuses gives the same numbers, and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ScaledTensor
from ..kernels.reference import row_scales
from ..nf4 import BLOCK, NF4Weight
from .backends import Backend

# rows of an fp8 product, below which cuBLASLt lacks a bias at some widths: up to 42 rows, at 12,288 and more (H200)
FEW = 64


class NF4Linear(nn.Module):
    """`x @ W.T + b` with W in NF4. `x` `[..., K]` in any float type, which is also the type of the product.

    The buffers are `packed` and `absmax`, and `weight` is None: transformers' T5 casts its input to `wo.weight.dtype`,
    and a packed weight would make that integers.
    """

    weight = None
    packed: Tensor
    absmax: Tensor
    row_scale: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None, backend: Backend) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("row_scale", None)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.backend = backend

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
        """Take the weight, and prepare it for fp8 if that was done before."""
        self.packed, self.absmax = weight.packed, weight.absmax
        if self.row_scale is not None:
            self.prepare_fp8()

    def prepare_fp8(self) -> None:
        """Compute what each row of the weight is divided by in fp8: 4 bytes a row."""
        self.row_scale = row_scales(self.absmax)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return F.linear(x, self.backend.dequantize(self.packed, self.absmax, x.dtype), self.bias)

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

    `x` is `[B, T, K]`, in fp8 if it has a scale; `scratch` as in `Backend.dequantize`. A list holds parts that count as
    one, side by side in K or in N. Each part takes a product, as do pictures that do not follow each other in memory.
    Not in fp8: several parts of `x`, which add up in `out`; and `gelu` (tanh form) of `out`, of its last part only.
    """
    xs, outs = [x] if isinstance(x, ScaledTensor) else x, [out] if isinstance(out, Tensor) else out
    if isinstance(linear, NF4Linear):
        row_scale = None if xs[0].scale is None else linear.row_scale
        weight = linear.backend.dequantize(linear.packed, linear.absmax, xs[0].values.dtype, row_scale, scratch)
    else:
        assert isinstance(linear, nn.Linear)
        row_scale, weight = None, linear.weight
    for part, rows in zip(outs, _side_by_side(outs), strict=True):
        row_scales, bias = (None if whole is None else whole[rows] for whole in (row_scale, linear.bias))
        for operand, columns in zip(xs, _side_by_side([x.values for x in xs]), strict=True):
            last = rows.stop == weight.shape[0] and columns.stop == weight.shape[1]
            for values, scale, y in _pictures(operand, part):
                addend = y if columns.start else bias
                product(values, scale, weight[rows, columns], row_scales, addend, y, gelu=gelu and last)


def product(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    gelu: bool = False,
) -> None:
    """`x` `[M, K]` times `weight` `[N, K]`, with scales `[M]` and `[N]` in fp8, into `out` `[M, N]`.

    `bias` is `[N]`, or (not in fp8) `out` itself, to add to it. `gelu`, not in fp8: the tanh form, in place.
    """
    if scale is None:
        if gelu and x.is_cuda and bias is not None:
            # inside the library's product, before rounding; on other devices it would be the erf form
            torch.ops.aten._addmm_activation.out(bias, x, weight.t(), use_gelu=True, out=out)
            return
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        if gelu:
            torch.ops.aten.gelu_(out, approximate="tanh")
        return
    assert row_scale is not None
    if x.device.type == "cuda":
        few = len(x) < FEW
        torch._scaled_mm(
            x, weight.t(), scale[:, None], row_scale[None, :], None if few else bias,
            out_dtype=out.dtype, use_fast_accum=True, out=out,
        )  # fmt: skip
        if few and bias is not None:
            out.add_(bias)
    else:  # the same numbers, so that results can be compared on any device
        y = (x.float() * scale[:, None]) @ (weight.float() * row_scale[:, None]).t()
        out.copy_(y if bias is None else y + bias)


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
