"""Checksums of a safetensors file, in its own metadata: one of the header, and one of each piece of each tensor.

CRC-32, since zlib has it everywhere and it is the fastest there: accidents are found, every one of a few bits among
them; it is no defence against somebody who means harm. Pieces are what an `Upload` reads at once, so that they are
checked in its threads.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from .upload import PIECE

CHECKSUMS = "checksums"  # the metadata's key
DIGITS = 8
_SAID = re.compile(rb'"checksums": "([0-9a-f]+)"')


def checksum(data: bytes | memoryview) -> int:
    """The CRC-32 of `data`."""
    return zlib.crc32(data)


def pieces(nbytes: int) -> list[slice]:
    """The pieces of a tensor of `nbytes` that have a checksum each."""
    return [slice(begin, min(begin + PIECE, nbytes)) for begin in range(0, nbytes, PIECE)]


def blank(count: int) -> str:
    """What stands in the header for its own checksum and `count` others while it is summed up."""
    return "0" * (1 + count) * DIGITS


def words(sums: Iterable[int]) -> str:
    """Checksums as the metadata has them."""
    return "".join(f"{value:0{DIGITS}x}" for value in sums)


def split(text: bytes) -> tuple[bytes, list[int]] | None:
    """A header's bytes as they were summed up, and the checksums it carries; None where it carries none."""
    found = _SAID.search(text)
    if found is None:
        return None
    begin, end = found.span(1)
    return text[:begin] + b"0" * (end - begin) + text[end:], numbers(found[1].decode())


def numbers(text: str) -> list[int]:
    """`words` back. Raises `ValueError`."""
    return [int(text[i : i + DIGITS], 16) for i in range(0, len(text), DIGITS)]
