"""Writing quantized weights: one safetensors file in the plain NF4 dialect, tensor by tensor.

safetensors' own writer wants every tensor in memory at once. Sizes are known from shapes, so the header can go
first and each weight can be quantized, written and forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nf4 import BLOCK, LEVELS
from .materialize import Target, is_quantized, read_nf4
from .tensors import NF4_STATE, Tensors

Named = tuple[nn.Module, str]  # a module on `meta`, and the prefix of its tensors' names
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8"}


def write_nf4(
    path: Path,
    tensors: Tensors,
    modules: Iterable[Named],
    target: Target,
    metadata: Mapping[str, str],
) -> str:
    """Write the tensors that `modules` name into `path`, linears in NF4; the sha256 of the file.

    Whole or not at all: a temporary name first, then a rename. Host memory holds what stays unquantized and one
    weight. Raises `OSError` where the disk is full or not writable.
    """
    weights: dict[str, tuple[int, int]] = {}
    plain: dict[str, Tensor] = {}
    for module, prefix in modules:
        linears = {
            f"{prefix}{name}.weight" for name, part in module.named_modules() if is_quantized(part, prefix + name)
        }
        for name, parameter in module.named_parameters():
            if prefix + name in linears:
                weights[prefix + name] = (parameter.shape[0], parameter.shape[1])
            else:
                plain[prefix + name] = tensors.read(prefix + name)
    header, offset = {}, 0
    for name, dtype, shape, nbytes in _entries(weights, plain):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    digest = hashlib.sha256()
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            for chunk in _chunks(header, weights, plain, tensors, target, metadata):
                file.write(chunk)
                digest.update(chunk)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def _entries(
    weights: Mapping[str, tuple[int, int]], plain: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, list[int], int]]:
    for name, tensor in plain.items():
        yield name, DTYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size()
    for name, (n, k) in weights.items():
        values, state = n * k, len(_state(n, k))
        yield name, "U8", [values // 2, 1], values // 2
        yield name + ".absmax", "F32", [values // BLOCK], values // BLOCK * 4
        yield name + ".quant_map", "F32", [len(LEVELS)], len(LEVELS) * 4
        yield name + NF4_STATE, "U8", [state], state


def _chunks(
    header: Mapping[str, object],
    weights: Mapping[str, tuple[int, int]],
    plain: Mapping[str, Tensor],
    tensors: Tensors,
    target: Target,
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **header}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name, tensor in plain.items():
        yield _bytes(tensor)
        target.progress(tensors.nbytes(name))
    for name, (n, k) in weights.items():
        weight = read_nf4(tensors, name, target)
        yield _bytes(weight.packed)
        yield _bytes(weight.absmax)
        yield _bytes(torch.tensor(LEVELS))
        yield _state(n, k)


def _state(n: int, k: int) -> bytes:
    # bitsandbytes' own keys; dtype is what its users decode to
    return json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [n, k]}).encode()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)
