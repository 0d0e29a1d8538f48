"""Reads the headers of safetensors and GGUF files, in bounded time and memory, whatever they contain.

Raises `ValueError` that says what is wrong, and `OSError`. Formats: safetensors' README, ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import quoted
from .filebytes import FileBytes
from .strict_json import unambiguous

LONGEST = 16 * 2**20  # bytes of a safetensors header, at most; FLUX's have 0.1 to 0.5 MB
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
GGML = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # ggml's types by number: name, values and bytes of a block  # fmt: skip
MAGIC = b"GGUF"
VALUES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # GGUF's plain types by number: bytes of a value
STRING, ARRAY, U32 = 8, 9, 4
STRINGS = 1_000_000  # in a GGUF header's arrays, at most; the largest vocabulary with its merges has 0.5 M
KEYS, TENSORS = 10_000, 50_000
DIMENSIONS = 8
NAME = 1024  # bytes, at most


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: its type, logical shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file, and its `metadata`: safetensors' table, or GGUF's strings."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_safetensors(file: FileBytes) -> Header:
    """The header of a safetensors file. Its tensors must fill the rest of the file without gaps."""
    if file.size < 8:
        raise ValueError(f"it has {file.size} bytes" if file.size else "it is empty")
    length = int.from_bytes(file.take(0, 8), "little")
    start = 8 + length
    if start > file.size:
        raise ValueError(f"its header should have {length} bytes, and the file has {file.size}")
    if length > LONGEST:
        raise ValueError(f"its header has {length / 1e6:.0f} MB; a model's has less than {LONGEST / 1e6:.0f}")
    try:
        table = unambiguous(file.take(8, length))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a table of texts")
    tensors = {name: _entry(name, entry, start) for name, entry in table.items()}
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise ValueError(f"{quoted(name)} does not follow what lies before it")
        end += entry.nbytes
    if end != file.size:
        what = "the download is incomplete" if end > file.size else "something was added to it"
        raise ValueError(f"it has {file.size} bytes and should have {end}: {what}")
    return Header(tensors, metadata)


def _entry(name: str, fields: object, start: int) -> Entry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"of {quoted(name)} it says {quoted(fields)}")
    if dtype not in BITS:
        raise ValueError(f"{quoted(name)} has the unknown type {quoted(dtype)}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{quoted(name)} has the shape {quoted(shape)}")
    bits = math.prod(shape[:DIMENSIONS]) * BITS[dtype]
    if len(shape) > DIMENSIONS or not 0 <= begin <= end or bits != 8 * (end - begin):
        raise ValueError(f"{quoted(name)} of {dtype} {quoted(shape)} does not take the bytes {begin} to {end}")
    return Entry(dtype, tuple(shape), start + begin, end - begin)


def read_gguf(file: FileBytes) -> Header:
    """The header of a GGUF file of version 2 or 3. Arrays are skipped, as none is needed."""
    cursor = _Cursor(file)
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number(U32)
    if version not in (2, 3):
        raise ValueError(f"it is GGUF of version {version}; versions 2 and 3 are read, in little-endian order")
    count, keys = cursor.number(10), cursor.number(10)
    if count > TENSORS or keys > KEYS:
        raise ValueError(f"it should have {count} tensors and {keys} keys")
    metadata: dict[str, str] = {}
    alignment = 32
    for _ in range(keys):
        key, kind = cursor.text(NAME), cursor.number(U32)
        if kind == STRING:
            metadata[key] = cursor.text(NAME, cut=True)
        elif key == "general.alignment" and kind == U32:
            alignment = cursor.number(U32)
        else:
            cursor.skip(kind)
    if not 1 <= alignment <= 2**20:
        raise ValueError(f"its alignment is {alignment}")
    found = [_gguf_entry(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    tensors, end = {}, start
    for name, entry in sorted(found, key=lambda item: item[1].offset):
        begin = start + entry.offset
        if name in tensors:
            raise ValueError(f"it names {quoted(name)} twice")
        if begin < end:
            raise ValueError(f"{quoted(name)} overlaps what lies before it")
        tensors[name] = Entry(entry.dtype, entry.shape, begin, entry.nbytes)
        end = begin + entry.nbytes
    if tensors and end > file.size:
        raise ValueError(f"it has {file.size} bytes and should have {end}: the download is incomplete")
    return Header(tensors, metadata)


def _gguf_entry(cursor: _Cursor) -> tuple[str, Entry]:
    name, dimensions = cursor.text(NAME), cursor.number(U32)
    if dimensions > DIMENSIONS:
        raise ValueError(f"{quoted(name)} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number(10) for _ in range(dimensions)]))  # stored innermost first
    kind, offset = cursor.number(U32), cursor.number(10)
    if kind not in GGML:
        raise ValueError(f"{quoted(name)} has the unknown type {kind}")
    dtype, block, nbytes = GGML[kind]
    values = math.prod(shape)
    if (shape[-1] if shape else 1) % block:
        raise ValueError(f"{quoted(name)} is {quoted(shape)}, which are not whole blocks of {dtype}")
    return name, Entry(dtype, shape, offset, values // block * nbytes)


class _Cursor:
    """Reads a GGUF header from its start. Every length is checked against the file's end before it is used."""

    WINDOW = 2**20

    def __init__(self, file: FileBytes) -> None:
        self.at = 0
        self._file = file
        self._window, self._from = b"", 0
        self._strings = STRINGS

    def take(self, count: int) -> bytes:
        first = self.at - self._from
        if not 0 <= first <= len(self._window) - count:
            self._ensure(count)
            size = min(max(count, self.WINDOW), self._file.size - self.at)
            self._window, self._from, first = self._file.take(self.at, size), self.at, 0
        self.at += count
        return self._window[first : first + count]

    def _ensure(self, count: int) -> None:
        if count > self._file.size - self.at:
            raise ValueError(f"its header goes on at byte {self.at + count}, and the file has {self._file.size}")

    def number(self, kind: int) -> int:
        return int.from_bytes(self.take(VALUES[kind]), "little")

    def text(self, longest: int, *, cut: bool = False) -> str:
        length = self.number(10)
        if length <= longest:
            return self.take(length).decode("utf-8", "replace")
        if not cut:
            raise ValueError(f"a name has {length} bytes")
        self._advance(length)
        return ""

    def _advance(self, count: int) -> None:
        self._ensure(count)
        self.at += count

    def skip(self, kind: int, deep: int = 0) -> None:
        """Skip a value of any type."""
        if kind in VALUES:
            self._advance(VALUES[kind])
        elif kind == STRING:
            self._advance(self.number(10))
        elif kind == ARRAY and deep < 4:
            inner, count = self.number(U32), self.number(10)
            if inner in VALUES:
                self._advance(count * VALUES[inner])
                return
            self._strings -= count
            if self._strings < 0:
                raise ValueError(f"it holds an array of {count} texts or arrays")
            for _ in range(count):
                self.skip(inner, deep + 1)
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}")
