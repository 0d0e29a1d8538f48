"""The file of a cache's entry: plain NF4 in safetensors. Every byte is checked while it is read.

The file is never mapped, but read into memory: removing or replacing it meanwhile changes nothing here.

Older entries have one SHA-256, in a manifest beside them. It is compared once, and checksums are then written there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import VortexCheckpointError
from ..storage.checksum import CHECKSUMS, checksum, numbers, pieces, split, words
from ..storage.dtypes import DTYPES
from ..storage.filebytes import FileBytes
from ..storage.upload import PIECE, THREADS, Upload, upload_to
from ..utils.temporary_files import partial

CPU = torch.device("cpu")
LARGEST = 100 * 10**6  # bytes of a header, as in safetensors itself


class DamagedEntry(VortexCheckpointError):
    """An entry that differs from what was written."""


class EntryFile:
    """An entry's tensors, a `Raw`. Raises `DamagedEntry` when opened or read, and `OSError`.

    `progress(0)` is called again and again while an older entry is compared with its SHA-256.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        self.where = str(path)
        self.files: tuple[Path, ...] = (path,)
        self._file = _Checked(path)
        self._upload: Upload | None = None
        start, text = self._file.header()
        said = split(text)
        summed, sums = said if said is not None else (text, _sums_beside(path, self._file, progress))
        if not sums or checksum(summed) != sums[0]:
            raise DamagedEntry(f"{path}: its header is damaged.", path=self.where)
        self._header: dict[str, dict[str, Any]] = json.loads(text)
        self.metadata: dict[str, str] = self._header.pop("__metadata__")
        places = list(_places(self._header, start))
        if len(places) != len(sums) - 1 or self._file.size != max((end for _, end in places), default=start):
            raise DamagedEntry(f"{path}: it is not as long as it was.", path=self.where)
        self._file.sums = {begin: value for (begin, _), value in zip(places, sums[1:], strict=True)}
        self._start = start
        self._places = places

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._header.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> str:
        """The type in the header, such as `BF16`."""
        return str(self._header[name]["dtype"])

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        begin, end = self._header[name]["data_offsets"]
        return int(end - begin)

    def small(self, name: str) -> bytes:
        """A small tensor's bytes, such as a JSON text."""
        return bytes(self.read(name).view(-1).view(torch.uint8).numpy().data)

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """The tensor on `device`, in new memory. Raises `DamagedEntry` and `OSError`."""
        device = torch.device(device)
        begin = self._start + self._header[name]["data_offsets"][0]
        on = device if device.type == "cuda" else CPU
        tensor = torch.empty(self.shape(name), dtype=DTYPES[self.dtype(name)], device=on)
        if on.type == "cuda":
            self._upload = self._upload or upload_to(device)
            self._upload(self._file, begin, tensor)
            return tensor
        memory = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        several = pieces(len(memory))

        def fill(piece: slice) -> None:
            self._file.read(begin + piece.start, memory[piece])

        if len(several) == 1:
            fill(several[0])
        else:
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
                list(threads.map(fill, several))
        return tensor.to(device)

    def verify(self) -> None:
        """Read everything. Raises `DamagedEntry` and `OSError`."""
        memory = memoryview(bytearray(max((end - begin for begin, end in self._places), default=0)))
        for begin, end in self._places:
            self._file.read(begin, memory[: end - begin])

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is still this one."""
        return self._file.is_at(path)

    @property
    def is_as_opened(self) -> bool:
        """See `Raw`."""
        return self._file.is_as_opened


class _Checked(FileBytes):
    """A file whose pieces are compared with `sums`, their checksums by the offset where they begin."""

    def __init__(self, path: Path) -> None:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise DamagedEntry(f"{path} is not a file.", path=str(path))
        super().__init__(path)
        self.where = str(path)
        self.sums: dict[int, int] = {}
        self.size = os.fstat(self._file.fileno()).st_size

    def header(self) -> tuple[int, bytes]:
        """Where the data begins, and the header's bytes."""
        size = int.from_bytes(self.some(0, min(8, self.size)), "little")
        if not 2 <= size <= min(self.size - 8, LARGEST):
            raise DamagedEntry(f"{self.where}: its header is damaged.", path=self.where)
        return 8 + size, self.some(8, size)

    def some(self, offset: int, count: int) -> bytes:
        """`count` bytes that have no checksum."""
        memory = bytearray(count)
        super().read(offset, memoryview(memory))
        return bytes(memory)

    def read(self, offset: int, memory: memoryview) -> None:
        super().read(offset, memory)
        if checksum(memory) != self.sums[offset]:
            raise DamagedEntry(f"{self.where}: bytes from {offset} on are damaged.", path=self.where)


def metadata(path: Path) -> dict[str, str]:
    """An entry's own metadata, unchecked; empty where it is damaged. Raises `OSError`."""
    try:
        said = json.loads(_Checked(path).header()[1])["__metadata__"]
        return {str(key): str(value) for key, value in said.items()}
    except (DamagedEntry, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def manifest_of(path: Path) -> Path:
    """The path of an older entry's manifest."""
    return path.with_suffix(".json")


def _places(header: dict[str, Any], start: int) -> Iterator[tuple[int, int]]:
    for begin, end in sorted(said["data_offsets"] for said in header.values()):
        yield from ((start + begin + piece.start, start + begin + piece.stop) for piece in pieces(end - begin))


def _sums_beside(path: Path, file: _Checked, progress: Callable[[int], None]) -> list[int]:
    """The checksums in an older entry's manifest; first written there, if the file still has its SHA-256."""
    try:
        manifest = json.loads(manifest_of(path).read_bytes())
        if CHECKSUMS in manifest:
            return numbers(manifest[CHECKSUMS])
        sha256 = str(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedEntry(f"{path} has no checksums.", path=str(path)) from error
    digest = hashlib.sha256()
    for begin in range(0, file.size, PIECE):
        digest.update(file.some(begin, min(PIECE, file.size - begin)))
        progress(0)
    if digest.hexdigest() != sha256:
        raise DamagedEntry(f"{path} has another SHA-256 than was written.", path=str(path))
    start, text = file.header()
    header = json.loads(text)
    header.pop("__metadata__", None)
    sums = [checksum(text)]
    for begin, end in _places(header, start):
        sums.append(checksum(file.some(begin, end - begin)))
        progress(0)
    try:
        with partial(manifest_of(path)) as written:
            written.write_text(json.dumps({**manifest, CHECKSUMS: words(sums)}))
    except OSError:  # another user's entry, which is compared again the next time
        pass
    return sums
