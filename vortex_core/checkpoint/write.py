"""Writes quantized weights into one safetensors file, in plain NF4, tensor by tensor.

The writer of safetensors needs all tensors in memory. Here sizes are known from shapes, so the header is written first,
and each weight is quantized, written and released. Other threads write and compute checksums meanwhile.
"""

from __future__ import annotations

import errno
import json
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

from ..device.select import host_buffer
from ..nf4 import BLOCK, LEVELS, UNQUANTIZED, join
from ..storage.checksum import CHECKSUMS, blank, checksum, pieces, words
from ..storage.dtypes import WORDS
from ..storage.materialize import Target, is_quantized, read_nf4, shapes
from ..storage.tensors import NF4_STATE, Tensors
from .key_maps import SWAPPED, flux_sources, source_rows

Named = tuple[nn.Module, str]  # a module on `meta`, and the prefix of its tensors' names
QUEUED = 8  # most chunks that wait to be written; each has at most half of the largest weight's bytes


@dataclass(frozen=True, slots=True)
class Naming:
    """The names in a file: those that a canonical tensor is cut into by rows, swapped ones, unquantized ones."""

    sources: Callable[[str], Sequence[str]]
    swapped: tuple[str, ...]
    unquantized: tuple[str, ...]


CANONICAL = Naming(lambda name: (name,), (), UNQUANTIZED)
# diffusers skips modules by the last part of their name; that would be `proj_out`, which single blocks have, too
DIFFUSERS = Naming(flux_sources, SWAPPED, tuple(name for name in UNQUANTIZED if name != "final_layer.linear"))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Names and shapes of the tensors to write: `weights` of linears, in NF4, and `plain` ones."""

    weights: Mapping[str, tuple[int, ...]]
    plain: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, modules: Iterable[Named], naming: Naming = CANONICAL) -> Wanted:
        """The tensors of `modules` on `meta`."""
        weights: dict[str, tuple[int, ...]] = {}
        plain: dict[str, tuple[int, ...]] = {}
        for module, prefix in modules:
            linears = {
                f"{prefix}{name}.weight"
                for name, part in module.named_modules()
                if is_quantized(part, prefix + name, naming.unquantized)
            }
            for name, shape in shapes(module, prefix).items():
                (weights if name in linears else plain)[name] = shape
        return cls(weights, plain)


def write_nf4(
    path: Path,
    tensors: Tensors,
    wanted: Wanted,
    target: Target,
    metadata: Mapping[str, str],
    naming: Naming = CANONICAL,
) -> None:
    """Write the `wanted` tensors into a new file, linears in NF4, with checksums in the header.

    Host memory holds all plain tensors and a few weights. Raises `OSError` where the disk is full or not writable; the
    caller then removes the file.
    """
    plain = {name: tensors.read(name).view(shape) for name, shape in wanted.plain.items()}
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape, nbytes in _entries(wanted.weights, plain, naming):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    free = shutil.disk_usage(path.parent).free
    if free < offset:
        raise OSError(
            errno.ENOSPC, f"{offset / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", str(path.parent)
        )
    with _Writer(path, header, metadata) as writer:
        for chunk in _chunks(wanted.weights, plain, tensors, target, naming):
            writer.put(chunk)


def _entries(
    weights: Mapping[str, tuple[int, ...]], plain: Mapping[str, Tensor], naming: Naming
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
    weights: Mapping[str, tuple[int, ...]],
    plain: Mapping[str, Tensor],
    tensors: Tensors,
    target: Target,
    naming: Naming,
) -> Iterator[bytes | memoryview]:
    """The bytes of each tensor of `_entries`, in that order."""
    for name, tensor in plain.items():
        if name.startswith(naming.swapped):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for rows in tensor.split([rows for _, rows in source_rows(naming.sources(name), tensor.shape[0])]):
            yield _bytes(rows)
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
    # bitsandbytes' own keys; dtype is what its users dequantize to
    return json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [n, k]}).encode()


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cuda":
        # new pageable memory is filled more slowly than the disk's cache; torch reuses pinned blocks
        tensor = host_buffer(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


class _Writer:
    """Writes a header, then chunks in order, each a tensor. One thread writes, another computes checksums.

    The checksums are put into the header at the end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        ends = (said["data_offsets"] for said in header.values())
        self._blank = blank(sum(len(pieces(end - begin)) for begin, end in ends))
        said = {"__metadata__": {"format": "pt", CHECKSUMS: self._blank, **metadata}}
        text = json.dumps(said | dict(header)).encode()
        self._text = text + b" " * (-len(text) % 8)
        self._sums = [checksum(self._text)]
        self._file = path.open("xb")
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]  # one thread each, which keeps the order
        first = len(self._text).to_bytes(8, "little") + self._text
        self._queue: deque[Future[Any]] = deque([self._threads[0].submit(self._file.write, first)])

    def put(self, chunk: bytes | memoryview) -> None:
        """Take a chunk, which must not change any more. Raises the error of an earlier chunk."""
        for thread, work in zip(self._threads, (self._file.write, self._sum), strict=True):
            self._queue.append(thread.submit(work, chunk))
        while len(self._queue) > 2 * QUEUED:
            self._queue.popleft().result()

    def _sum(self, chunk: bytes | memoryview) -> None:
        memory = memoryview(chunk)
        self._sums += [checksum(memory[piece]) for piece in pieces(len(memory))]

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
            if error is None:
                self._file.seek(8)
                self._file.write(self._text.replace(self._blank.encode(), words(self._sums).encode(), 1))
        finally:
            self._file.close()
