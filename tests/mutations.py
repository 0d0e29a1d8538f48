"""Headers of safetensors and GGUF files, changed by a seed: what a test tries a few of, and a tool many."""

from __future__ import annotations

import json
import random
from typing import Any

GGUF_HEADER = 400  # bytes of the small file's
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "F4", "F8_E8M0", "X")
NUMBERS = (0, 1, -1, 2, 8, 64, 127, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
JUNK: tuple[Any, ...] = (None, True, -1, 2**65, 0.5, float("nan"), "", "\ud800", [], [[]], {}, {"a": 1}, [2**62] * 9)


def mutated(source: bytes, edits: list[tuple[str, Any, Any]]) -> bytes:
    """A safetensors file, changed in its header as `edits` say: by bytes, or in its meaning."""
    for what, where, value in edits:
        length = int.from_bytes(source[:8], "little")
        if what in ("byte", "cut"):
            at = int(where * min(len(source), 8 + length))
            source = source[:at] + (bytes([value]) + source[at + 1 :] if what == "byte" else b"")
            continue
        if what == "length":
            source = value.to_bytes(8, "little") + source[8:]
            continue
        try:
            header = json.loads(source[8 : 8 + length])
            names = sorted(header)
            name = names[where % len(names)]
            entry = header[name]
            if what == "drop":
                del header[name]
            elif what == "rename":
                header[value] = header.pop(name)
            elif what == "swap":
                other = names[value % len(names)]
                header[name], header[other] = header[other], entry
            elif what == "entry":
                header[name] = value
            elif what == "data":
                at = 8 + length + entry["data_offsets"][0]
                source = source[:at] + bytes([value]) + source[at + 1 :]
                continue
            else:
                entry[what] = value
            text = json.dumps(header).encode("utf-8", "surrogatepass")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError):
            continue  # an edit before this one left no header to change
        source = len(text).to_bytes(8, "little") + text + source[8 + length :]
    return source


def safetensors(source: bytes, seed: int) -> bytes:
    """A sound safetensors file with one to three changes in its header."""
    dice = random.Random(seed)
    edits: list[tuple[str, Any, Any]] = []
    for _ in range(dice.randint(1, 3)):
        what = dice.choice(
            ["byte", "cut", "length", "drop", "rename", "swap", "dtype", "shape", "data_offsets", "entry"]
        )
        where: Any = dice.random() if what in ("byte", "cut") else dice.randrange(1000)
        value: Any = dice.choice(JUNK)
        if what in ("byte", "swap"):
            value = dice.randrange(256)
        elif what == "length":
            value = abs(dice.choice(NUMBERS))
        elif what == "rename":
            value = dice.choice(["", "__metadata__", "img_in.weight.scale", "a" * 3000, "double_blocks.99999999999.x"])
        elif what == "dtype" and dice.random() < 0.8:
            value = dice.choice(DTYPES)
        elif what in ("shape", "data_offsets") and dice.random() < 0.8:
            value = [dice.choice(NUMBERS) for _ in range(dice.randrange(4))]
        edits.append((what, where, value))
    return mutated(source, edits)


def gguf(source: bytes, seed: int) -> bytes:
    """A sound GGUF file with one to four bytes or numbers of its header changed, perhaps cut."""
    dice = random.Random(seed)
    data = bytearray(source)
    for _ in range(dice.randint(1, 4)):
        at, size = dice.randrange(GGUF_HEADER), dice.choice([1, 1, 4, 8])
        data[at : at + size] = (abs(dice.choice(NUMBERS)) % 256**size).to_bytes(size, "little")
    return bytes(data[: dice.randrange(len(data))] if dice.random() < 0.2 else data)
