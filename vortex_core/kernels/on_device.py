"""Every launch under the device of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def on_device(function: Callable[P, None]) -> Callable[P, None]:
    """`function`, called with the device of its first tensor argument (maybe inside a tuple) as the current one.

    Kernels are launched on the current device, wherever the tensors are. Only CUDA devices are switched.
    """

    @wraps(function)
    def launched(*args: P.args, **kwargs: P.kwargs) -> None:
        first = _first_tensor((*args, *kwargs.values()))
        if first is None or not first.is_cuda or first.get_device() == torch.cuda.current_device():
            function(*args, **kwargs)
            return
        with torch.cuda.device(first.device):
            function(*args, **kwargs)

    return launched


def _first_tensor(values: Iterable[object]) -> Tensor | None:
    for value in values:
        found = _first_tensor(value) if isinstance(value, tuple) else value
        if isinstance(found, Tensor):
            return found
    return None
