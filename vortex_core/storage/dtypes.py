"""safetensors' names of types and torch's, and memory to read tensors into."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}  # the types in FLUX files
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor in host memory. numpy asks for huge pages, which halves the time to fill it."""
    import numpy as np

    memory = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(tuple(shape))


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data
