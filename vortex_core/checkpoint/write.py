"""Writing quantized weights: one safetensors file in the plain NF4 dialect, tensor by tensor.

safetensors' own writer wants every tensor in memory at once. Sizes are known from shapes, so the header can go
first and each weight can be quantized, written and forgotten. Writing and summing up run beside the quantizing.
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """Names and shapes of what is written: linears' `weights`, and what stays `plain`."""

    weights: Mapping[str, tuple[int, ...]]
    plain: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, modules: Iterable[Named], naming: Naming = CANONICAL) -> Wanted:
        """What `modules` on `meta` need."""
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
    """Write the `wanted` tensors into `path`, a new file, linears in NF4, checksums in the header.

    Host memory holds what stays unquantized and a few weights. Raises `OSError` where the disk is full or not
    writable; what is written till then is the caller's to remove.
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
    # bitsandbytes' own keys; dtype is what its users decode to
    return json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [n, k]}).encode()


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cuda":
        # fresh pageable memory is slower to fill than the disk's cache; torch keeps and reuses pinned blocks
        tensor = host_buffer(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


class _Writer:
    """Writes a header, then chunks in order, each a tensor, and sums them up in another thread while the next is made.

    The checksums take their place in the header at the end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        ends = (said["data_offsets"] for said in header.values())
        self._blank = blank(sum(len(pieces(end - begin)) for begin, end in ends))
        said = {"__metadata__": {"format": "pt", CHECKSUMS: self._blank, **metadata}}
        text = json.dumps(said | dict(header)).encode()
        self._text = text + b" " * (-len(text) % 8)
        self._sums = [checksum(self._text)]
        self._file = path.open("xb")
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]  # one each keeps the order
        first = len(self._text).to_bytes(8, "little") + self._text
        self._queue: deque[Future[Any]] = deque([self._threads[0].submit(self._file.write, first)])

    def put(self, chunk: bytes | memoryview) -> None:
        """Take a chunk, which must not change any more. Raises what went wrong with one before it."""
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
