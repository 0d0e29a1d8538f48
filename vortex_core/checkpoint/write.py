"""Writing quantized weights: one safetensors file in the plain NF4 dialect, tensor by tensor.

safetensors' own writer wants every tensor in memory at once. Sizes are known from shapes, so the header can go
first and each weight can be quantized, written and forgotten. Writing and hashing run beside the quantizing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..nf4 import BLOCK, LEVELS, join
from .dtypes import WORDS
from .layout import SWAPPED, flux_sources, source_rows
from .materialize import UNQUANTIZED, Target, is_quantized, read_nf4
from .tensors import NF4_STATE, Tensors

Named = tuple[nn.Module, str]  # a module on `meta`, and the prefix of its tensors' names
QUEUED = 8  # chunks that wait to be written, each at most half of the largest weight


@dataclass(frozen=True, slots=True)
class Naming:
    """How canonical tensors are written: the names each is cut into by rows, whose halves swap, what stays plain."""

    sources: Callable[[str], Sequence[str]]
    swapped: tuple[str, ...]
    unquantized: tuple[str, ...]


CANONICAL = Naming(lambda name: (name,), (), UNQUANTIZED)
# diffusers tells modules to leave alone by the last part of their name, and single blocks have a `proj_out` too
DIFFUSERS = Naming(flux_sources, SWAPPED, tuple(name for name in UNQUANTIZED if name != "final_layer.linear"))


def write_nf4(
    path: Path,
    tensors: Tensors,
    modules: Iterable[Named],
    target: Target,
    metadata: Mapping[str, str],
    naming: Naming = CANONICAL,
) -> str:
    """Write the tensors that `modules` name into `path`, linears in NF4; the sha256 of the file.

    Whole or not at all: a temporary name first, then a rename. Host memory holds what stays unquantized and a few
    weights. Raises `OSError` where the disk is full or not writable.
    """
    weights: dict[str, tuple[int, int]] = {}
    plain: dict[str, Tensor] = {}
    for module, prefix in modules:
        linears = {
            f"{prefix}{name}.weight"
            for name, part in module.named_modules()
            if is_quantized(part, prefix + name, naming.unquantized)
        }
        for name, parameter in module.named_parameters():
            if prefix + name in linears:
                weights[prefix + name] = (parameter.shape[0], parameter.shape[1])
            else:
                plain[prefix + name] = tensors.read(prefix + name).view(parameter.shape)
    header, offset = {}, 0
    for name, dtype, shape, nbytes in _entries(weights, plain, naming):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    free = shutil.disk_usage(path.parent).free
    if free < offset:
        raise OSError(errno.ENOSPC, f"{offset / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", str(path))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _Writer(partial) as writer:
            for chunk in _chunks(header, weights, plain, tensors, target, metadata, naming):
                writer.put(chunk)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return writer.sha256


def _entries(
    weights: Mapping[str, tuple[int, int]], plain: Mapping[str, Tensor], naming: Naming
) -> Iterator[tuple[str, str, list[int], int]]:
    for name, tensor in plain.items():
        for theirs, rows in source_rows(naming.sources(name), tensor.shape[0]):
            shape = [rows, *tensor.shape[1:]]
            yield theirs, WORDS[tensor.dtype], shape, torch.Size(shape).numel() * tensor.itemsize
    for name, (n, k) in weights.items():
        for theirs, rows in source_rows(naming.sources(name), n):
            values, state = rows * k, len(_state(rows, k))
            yield theirs, "U8", [values // 2, 1], values // 2
            yield theirs + ".absmax", "F32", [values // BLOCK], values // BLOCK * 4
            yield theirs + ".quant_map", "F32", [len(LEVELS)], len(LEVELS) * 4
            yield theirs + NF4_STATE, "U8", [state], state


def _chunks(
    header: Mapping[str, object],
    weights: Mapping[str, tuple[int, int]],
    plain: Mapping[str, Tensor],
    tensors: Tensors,
    target: Target,
    metadata: Mapping[str, str],
    naming: Naming,
) -> Iterator[bytes | memoryview]:
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **header}).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name, tensor in plain.items():
        # rows follow one another in the file as they do in memory, whatever names they go by
        yield _bytes(torch.cat(tensor.chunk(2)[::-1]) if name.startswith(naming.swapped) else tensor)
        target.progress(tensors.nbytes(name))
    for name, (n, k) in weights.items():
        weight = read_nf4(tensors, name, target, target.device)
        if name.startswith(naming.swapped):
            weight = join(weight.halves()[::-1])
        first = 0
        for _, rows in source_rows(naming.sources(name), n):
            yield _bytes(weight.packed[first : first + rows])
            yield _bytes(weight.absmax[first : first + rows])
            yield _bytes(torch.tensor(LEVELS))
            yield _state(rows, k)
            first += rows


def _state(n: int, k: int) -> bytes:
    # bitsandbytes' own keys; dtype is what its users decode to
    return json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [n, k]}).encode()


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cuda":
        # fresh pageable memory is slower to fill than the disk's cache; torch keeps and reuses pinned blocks
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


class _Writer:
    """Writes and hashes chunks in order, each in a thread of its own, while the next is made. `sha256` at the end."""

    def __init__(self, path: Path) -> None:
        self.sha256 = ""
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]  # one each keeps the order
        self._queue: deque[Future[Any]] = deque()

    def put(self, chunk: bytes | memoryview) -> None:
        """Take a chunk, which must not change any more. Raises what went wrong with one before it."""
        for thread, work in zip(self._threads, (self._file.write, self._digest.update), strict=True):
            self._queue.append(thread.submit(work, chunk))
        while len(self._queue) > 2 * QUEUED:
            self._queue.popleft().result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=error is not None)
        try:
            while self._queue and error is None:
                self._queue.popleft().result()
        finally:
            self._file.close()
        self.sha256 = self._digest.hexdigest()
