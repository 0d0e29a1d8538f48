"""Checks weights that are read: one NaN in a file makes every picture black, so the error names the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import VortexCheckpointError

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 256  # tensors on a GPU that are checked together, since each check waits for the device


class Finite:
    """Checks tensors that were read: on the CPU at once, on a GPU at `settle`. `where` names their source."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._names: list[str] = []
        self._ends: list[Tensor] = []

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """Check a tensor (16, 32 or 64 bits), and return it. Raises `VortexCheckpointError` for NaN or infinity."""
        import torch

        if not tensor.numel():
            return tensor
        if tensor.device.type == "cpu":
            # a sum takes half the time of both ends, but may overflow
            if not bool(tensor.sum().isfinite()) and not _finite(*torch.aminmax(tensor)):
                raise self._error(name)
            return tensor
        self._names.append(name)
        self._ends += torch.aminmax(tensor)  # NaN is kept
        if len(self._names) == AT_ONCE:
            self.settle()
        return tensor

    def settle(self) -> None:
        """Raise `VortexCheckpointError` naming the first tensor on a GPU that holds NaN or infinity."""
        import torch

        names, ends = self._names, self._ends
        self._names, self._ends = [], []
        if not names:
            return
        finite = torch.stack([end.isfinite() for end in ends]).view(-1, 2).all(dim=1).tolist()
        for name, fine in zip(names, finite, strict=True):
            if not fine:
                raise self._error(name)

    def _error(self, name: str) -> VortexCheckpointError:
        return VortexCheckpointError(
            f"{self._where}: {name} holds NaN or infinite values. The file is damaged or was converted wrongly; "
            "download it again.",
            path=self._where,
        )


def _finite(*ends: Tensor) -> bool:
    return all(bool(end.isfinite()) for end in ends)
