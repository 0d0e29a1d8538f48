"""One step by the host's code: its linears multiply by the engine's weights, its modulation is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..vortex_core.flux1.spec import FluxSpec
    from ..vortex_core.runtime.lending import Lent
    from .native_prompts import Row
    from .native_route import Call


class Eager:
    """What linears answer during one step.

    `rows`: where in the table each modulation linear's answer is. `table` `[B, rows, D]`; None: modulation is computed.
    The table is right as long as the embedders get `inputs`, and modulation linears what those made of them: that is
    compared, since a patch may change time, text or `vec` on the way.
    """

    def __init__(
        self, lent: Lent, rows: Mapping[str, slice], table: Tensor | None, inputs: Mapping[str, Tensor]
    ) -> None:
        self.lent = lent
        self._rows, self._table, self._inputs = rows, table, inputs
        self._embedded: dict[str, Tensor] = {}
        self._vec: Tensor | None = None

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x` `[..., K]` times the linear of that name."""
        if name in self._rows and self._table is not None and self._is_known(x):
            return self._table[:, self._rows[name]].reshape(*x.shape[:-1], -1)
        if name in self._inputs and not _equal(x, self._inputs[name]):
            self._table = None
        out = self.lent.linear(name, x)
        if name.endswith("out_layer"):
            self._embedded[name] = out
        return out

    def _is_known(self, x: Tensor) -> bool:
        """Whether `x` is what the table was made of."""
        import torch.nn.functional as F

        if len(self._embedded) < 2:
            return False
        if self._vec is None:
            time, text = self._embedded.values()
            self._vec = F.silu(time + text)
        return _equal(x.reshape(-1, x.shape[-1]), self._vec)


def table_of(rows: list[Row], x: Tensor) -> Tensor:
    """The modulation of each row `[B, rows, D]`, like `x`."""
    import torch

    return torch.stack([conditioning.rows(t) for t, conditioning in rows]).to(x.device, x.dtype)


def inputs_of(call: Call, spec: FluxSpec) -> dict[str, Tensor]:
    """What the host's code gives to the embedders of time and text, as it comes from outside."""
    from comfy.ldm.flux.layers import timestep_embedding

    pooled = call.given.get("y")
    inputs = {"time_in.in_layer": timestep_embedding(call.given["timestep"], 256).to(call.x.dtype)}
    return inputs if pooled is None else inputs | {"vector_in.in_layer": pooled[:, : spec.vec]}


def _equal(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
