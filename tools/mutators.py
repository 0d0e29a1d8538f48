"""Hostile input, one small function a kind: sound bytes and dice go in, changed bytes come out.

For tools/fuzz.py and the tests. What a kind means is in `KINDS`; the same dice give the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Dice = random.Random

TEXTS = (
    "", "\x00", "\ud800", "a" * 300, "../../etc/passwd", "[bold]x[/bold]", "[/]", "owner/repo", "C:\\x", "%s%n",
    "\u202e", "(x:1.2)", "embedding:a", "\r\n\t", "\U0001f300" * 40, "{}", "null", "cuda:99", "nan", "gelu_new", "fp4",
    "NaN", "-1",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 63, 64, 65, 1000, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**9, 10**18, 0.0, -0.0,
    0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "F4", "F8_E8M0", "X", "")
NAMES = (
    ".scale_weight", ".scale", ".weight_scale_inv", ".absmax", ".quant_map", ".nested_absmax", ".qweight",
    "_quantizer._scale",
)  # fmt: skip


PIECES = (b"\x00", b"\xff\xfe", b'"', b"}", b"[" * 50, b"\xef\xbb\xbf")
WHOLE = (b"", b"[" * 100_000, b'{"a":' * 20_000, b"null", b"[]", b"{}", b'"x"', b"9" * 5000, b"\xff" * 64)


def junk(dice: Dice, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = dice.randrange(8 if depth else 6)
    if kind < 2:
        return dice.choice(NUMBERS)
    if kind < 4:
        return dice.choice(TEXTS)
    if kind < 6:
        return dice.choice((None, True, False))
    values = [junk(dice, depth - 1) for _ in range(dice.randrange(4))]
    return values if kind == 6 else {dice.choice(TEXTS): value for value in values}


def near(dice: Dice, value: Any) -> Any:
    """A value of the same type, nearby: what a check of types alone lets pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return dice.choice(
            (value + 1, value - 1, value * 2, value // 2, -value, value * 1000, float(value), str(value))
        )
    if isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        return dice.choice((value[:at], value[:at] + "x" + value[at:], value.upper(), value + "_", value[::-1]))
    if isinstance(value, list):
        return dice.choice((value[:-1], value * 2, value[::-1], [junk(dice, 0) for _ in value], [*value, 1]))
    return junk(dice)


def places(tree: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    """Every container of a JSON tree with each of its keys, the outermost first, at most so many."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < most:
        inside = waiting.pop(0)
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        found += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    return found


def tree(dice: Dice, value: Any, names: tuple[str, ...] = ()) -> Any:
    """A JSON tree, changed in its meaning at 1 to 3 places; `names` are keys that may be added at the top."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if names and isinstance(value, dict) and dice.random() < 0.2:
            value[dice.choice(names)] = junk(dice)
            continue
        if not found or dice.random() < 0.02:
            return junk(dice)
        # the top of a deep tree is a small part of it, and means the most
        inside, key = dice.choice(found if dice.random() < 0.5 else found[:30])
        act = dice.randrange(5)
        if act == 0:
            inside[key] = junk(dice)
        elif act in (1, 2):
            inside[key] = near(dice, inside[key])
        elif act == 3:
            inside.pop(key)
        else:
            other, there = dice.choice(found)
            if isinstance(other, dict) or there < len(other):
                inside[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else other[there]))
    return value


def text(dice: Dice, data: bytes) -> bytes:
    """Bytes, changed as bytes: flipped, cut, doubled, put in, nested deeply."""
    act = dice.randrange(12)
    at = dice.randrange(len(data) + 1)
    if act < 5:
        changed = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            if changed:
                changed[dice.randrange(len(changed))] = dice.randrange(256)
        return bytes(changed)
    if act < 8:
        return data[:at]
    if act < 10:
        return (
            data[:at]
            + dice.choice((b"\x00", b"\xff\xfe", b'"', b"}", b"[" * 50, b"\xef\xbb\xbf", data[:50]))
            + data[at:]
        )
    return dice.choice(
        (b"", b"[" * 100_000, b'{"a":' * 20_000, b"null", b"[]", b"{}", b'"x"', b"9" * 5000, b"\xff" * 64)
    )


def json_file(names: tuple[str, ...] = ()) -> Callable[[Dice, bytes], bytes]:
    """A mutator of JSON files: mostly in their meaning, else as bytes."""

    def mutate(dice: Dice, data: bytes) -> bytes:
        if dice.random() < 0.25:
            return text(dice, data)
        return json.dumps(tree(dice, json.loads(data), names)).encode("utf-8", "surrogatepass")

    return mutate


def safetensors(dice: Dice, data: bytes) -> bytes:
    """A safetensors file, changed in its header: in its length, its text or its meaning."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if dice.random() < 0.1:
        return dice.choice(NUMBERS[:17]).to_bytes(16, "little", signed=True)[:8] + data[8:]
    if dice.random() < 0.1:
        return data[: int(dice.random() ** 3 * len(data))]
    if dice.random() < 0.2:
        header = text(dice, header)
        return len(header).to_bytes(8, "little") + header + body
    entries = json.loads(header)
    for _ in range(dice.choice((1, 1, 2, 3))):
        name = dice.choice(sorted(entries)) if entries else ""
        entry = entries.get(name)
        act = dice.randrange(9)
        if act == 0:
            entries.pop(name, None)
        elif act == 1:
            entries[dice.choice((name + "x", dice.choice(TEXTS), name.replace("0", "7"), "lora." + name))] = entry
            entries.pop(name, None)
        elif act == 2:
            entries[name.removesuffix(".weight") + dice.choice(NAMES)] = {
                "dtype": "F32", "shape": [], "data_offsets": [0, 4],
            }  # fmt: skip
        elif act == 3:
            entries[name] = junk(dice)
        elif act == 4:
            other = dice.choice(sorted(entries)) if entries else ""
            entries[name], entries[other] = entries.get(other), entry
        elif isinstance(entry, dict):
            field = dice.choice(("dtype", "shape", "data_offsets"))
            value = dice.choice(DTYPES) if field == "dtype" and dice.random() < 0.8 else near(dice, entry.get(field))
            entry[field] = value if dice.random() < 0.8 else junk(dice)
    made = json.dumps(entries).encode("utf-8", "surrogatepass")
    return len(made).to_bytes(8, "little") + made + body


def gguf(dice: Dice, data: bytes, header: int = 600) -> bytes:
    """A GGUF file, changed in its header: its bytes, its lengths and counts, or cut."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(min(header, len(changed)))
        act = dice.randrange(4)
        if act == 0:
            changed[at] = dice.randrange(256)
        elif act == 1:
            changed[at] ^= 1 << dice.randrange(8)
        else:  # numbers lie at multiples of 4 first, later anywhere
            at = dice.choice((4, 8, 16, at - at % 4, at))
            size = dice.choice((4, 8))
            number = dice.choice([n for n in NUMBERS if isinstance(n, int)])
            changed[at : at + size] = (number % 256**size).to_bytes(size, "little")
    return bytes(changed[: int(dice.random() * len(changed))] if dice.random() < 0.1 else changed)


def words(dice: Dice, data: bytes = b"") -> str:
    """A prompt, or what else is written into a PNG's text."""
    parts = [
        dice.choice((*TEXTS, "a red circle", "\\", "'", '"', "<b>", "\x7f", "\x1b[31m", "ÅäÖ", "猫")) for _ in range(4)
    ]
    made = dice.choice(("", " ", "\n")).join(parts[: dice.randint(1, 4)])
    return made * (dice.choice((1, 1, 1, 50, 2000)))


CONFIG_NAMES = (
    "auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "_name_or_path", "torch_dtype",
    "dtype", "use_kernels", "trust_remote_code", "architectures", "_class_name", "model_type", "guidance_embeds",
    "__class__",
)  # fmt: skip
KINDS: dict[str, Callable[[Dice, bytes], bytes]] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "config": json_file(CONFIG_NAMES),
    "tokenizer": json_file(("normalizer", "pre_tokenizer", "post_processor", "added_tokens", "truncation", "padding")),
    "index": json_file(("weight_map", "metadata")),
}
