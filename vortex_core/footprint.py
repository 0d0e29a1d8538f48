"""What a call allocates, found by running the very same code on `meta` tensors: no device, no data, no formula.

Every storage that an operation makes is seen when it comes and when it goes, and the trace is fitted into one block
as torch's allocator would (allocator.py). What a kernel takes inside is not seen, so it is added where it matters:
a convolution may turn its input, weight and output into another layout, and takes about as much where they have
channels last; attention keeps statistics, and an fp32 copy of its output where heads are too wide for fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .allocator import Event, block_for
from .latency import unmeasured

META = torch.device("meta")
WIDE_HEAD = 256  # channels; wider heads are served by the memory-efficient kernel, which accumulates in fp32


def footprint(call: Callable[[], object]) -> int:
    """Bytes one block of device memory must have for `call`, which works on `meta` tensors.

    Not for inference mode: composed operations come as one there, and what they take inside is not seen.
    """
    return block_for(trace(call))


def trace(call: Callable[[], object]) -> list[Event]:
    """What `call` takes and gives back on `meta`, in order, but its result."""
    recorder = _Recorder()
    with torch.no_grad(), _Attention(), recorder, unmeasured():
        result = call()
    del result
    return recorder.events


class _Recorder(TorchDispatchMode):
    """Notes each storage that operations make, and when it is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self._known: dict[int, StorageWeakRef] = {}  # what is not ours, by the address of its storage
        self._live: dict[int, tuple[int, StorageWeakRef]] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref.cdata not in self._live:
                self._known.setdefault(ref.cdata, ref)
        for key in [key for key, (_, ref) in self._live.items() if ref.expired()]:
            self.events.append((self._live.pop(key)[0], 0))
        result = func(*args, **(kwargs or {}))
        convolves = func is torch.ops.aten.convolution.default
        if convolves and any(_channels_last(tensor) for tensor in args[:2]):
            result = result.contiguous(memory_format=torch.channels_last)  # as CUDA has it, and `meta` has not
        for tensor in _tensors(result):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref.cdata not in self._known and ref.cdata not in self._live and tensor.untyped_storage().nbytes():
                self._live[ref.cdata] = (self._take(tensor.untyped_storage().nbytes()), ref)
        if convolves:
            inside = sum(_nbytes(tensor) for tensor in (args[0], args[1], result))
            self.events.append((self._take(inside), 0))
        return result

    def _take(self, size: int) -> int:
        self._count += 1
        self.events.append((self._count, size))
        return self._count


class _Attention(TorchFunctionMode):
    """Attention as the fused kernels allocate it; on `meta` torch would spell it out with whole score matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q: Tensor = args[0]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        inside = q.shape if q.shape[-1] > WIDE_HEAD else q.shape[:-1]
        torch.empty(inside, dtype=torch.float32, device=q.device)  # gone at once
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
