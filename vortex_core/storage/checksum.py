"""Checksums of a safetensors file, in its own metadata: one of the header, and one of each piece of each tensor.

They are CRC-32, the fastest in zlib, which is everywhere. It finds accidents, such as any few bits that changed; it is
no defence against an attacker. A piece is what an `Upload` reads at once, so its threads can check it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

from .upload import PIECE

CHECKSUMS = "checksums"  # the metadata's key
DIGITS = 8
_FIELD = re.compile(rb'"checksums": "([0-9a-f]+)"')


def checksum(data: bytes | memoryview) -> int:
    """The CRC-32 of `data`."""
    return zlib.crc32(data)


def pieces(nbytes: int) -> list[slice]:
    """The pieces of a tensor of `nbytes`; each has a checksum."""
    return [slice(begin, min(begin + PIECE, nbytes)) for begin in range(0, nbytes, PIECE)]


def blank(count: int) -> str:
    """The text that takes the place of the header's checksum and `count` others, for summing up the header."""
    return "0" * (1 + count) * DIGITS


def words(sums: Iterable[int]) -> str:
    """Checksums as text for the metadata."""
    return "".join(f"{value:0{DIGITS}x}" for value in sums)


def split(text: bytes) -> tuple[bytes, list[int]] | None:
    """A header's bytes as they were summed up, and the checksums in it; None where it has none."""
    found = _FIELD.search(text)
    if found is None:
        return None
    begin, end = found.span(1)
    return text[:begin] + b"0" * (end - begin) + text[end:], numbers(found[1].decode())


def numbers(text: str) -> list[int]:
    """Checksums from the text of `words`. Raises `ValueError`."""
    return [int(text[i : i + DIGITS], 16) for i in range(0, len(text), DIGITS)]
