"""The precisions in which a step multiplies: what each one needs, and how its products are computed.

`exact` multiplies in 16 bits. `fp8` and `int8` multiply operands of 8 bits, each row of a weight and each token with a
scale of its own. int8 rotates both operands before it rounds them (kernels/rotation.py), which leaves the product as it
was and spreads outliers: it rounds a third as coarsely as fp8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Kernels, reference
from ..kernels.scaled_tensor import FP8

# rows of an fp8 product, below which cuBLASLt lacks a bias at some widths: up to 42 rows, at 12,288 and more (H200)
FEW = 64


class Precision(ABC):
    """A way to multiply. `operand` is the type of both operands; None: that of the activations, as they are.

    `fp8_attention`: attention packs its heads in fp8, too; else the library attends in 16 bits.
    """

    name: str
    operand: torch.dtype | None = None
    fp8_attention: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def scaled(self) -> bool:
        """Whether operands have scales: their kernels then apply the GELU and join what is one operand."""
        return self.operand is not None

    @abstractmethod
    def product(
        self,
        x: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        *,
        gelu: bool = False,
    ) -> None:
        """`x` `[M, K]` times `weight` `[N, K]` into `out` `[M, N]`, summed in at least fp32.

        `scale` `[M]` and `row_scale` `[N]` where operands have scales. `bias` is `[N]`. Without scales it may be `out`
        itself, to add to it, and `gelu` is the tanh form, in place.
        """


class Exact(Precision):
    """16-bit products, as diffusers with bitsandbytes has them."""

    name = "exact"

    def product(
        self,
        x: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        *,
        gelu: bool = False,
    ) -> None:
        """See `Precision.product`."""
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


@dataclass(frozen=True, slots=True)
class Fp8(Precision):
    """Products in fp8 (e4m3) by the library."""

    fp8_attention: bool = False
    name = "fp8"
    operand = FP8

    def product(
        self,
        x: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        *,
        gelu: bool = False,
    ) -> None:
        """See `Precision.product`."""
        assert scale is not None
        assert row_scale is not None
        if x.device.type != "cuda":  # the same numbers, so that results can be compared on any device
            y = (x.float() * scale[:, None]) @ (weight.float() * row_scale[:, None]).t()
            out.copy_(y if bias is None else y + bias)
            return
        few = len(x) < FEW
        torch._scaled_mm(
            x, weight.t(), scale[:, None], row_scale[None, :], None if few else bias,
            out_dtype=out.dtype, use_fast_accum=True, out=out,
        )  # fmt: skip
        if few and bias is not None:
            out.add_(bias)


@dataclass(frozen=True, slots=True)
class Int8(Precision):
    """Products of rotated operands in int8, with exact sums, by `kernels`."""

    kernels: Kernels = reference
    name = "int8"
    operand = torch.int8

    def product(
        self,
        x: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        *,
        gelu: bool = False,
    ) -> None:
        """See `Precision.product`."""
        assert scale is not None
        assert row_scale is not None
        self.kernels.multiply_int8(x, scale, weight, row_scale, bias, out)


EXACT = Exact()
