"""Makes hostile input, with one small function a kind: sound bytes and dice go in, changed bytes come out.

tools/hardening/fuzz.py and the tests share this vocabulary. `KINDS` lists the kinds; the same dice give the same bytes.
Changes of a safetensors file are a list of `Edit`s, so that hypothesis can draw and shrink them, too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

Dice = random.Random
Edit = tuple[str, Any, Any]  # what is changed, where, to what: see `edited`

# ---------------------------------------------------------------- vocabulary

TEXTS = (
    "", "x", "\x00", "\ud800", "a" * 300, "../../etc/passwd", "[bold]x[/bold]", "[/]", "owner/repo",
    "owner/repo@main:f", "C:\\x", "%s%n", "\u202e", "(x:1.2)", "(a+)+$", "embedding:a", "\r\n\t", "\U0001f300" * 40,
    "{}", "null", "cuda:99", "nan", "gelu", "gelu_new", "flash_attention_2", "fp4", "NaN", "-1",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 63, 64, 65, 77, 127, 255, 1000, 2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1,
    2**63, 2**64 - 1, 2**64, -(2**63), 10**9, 10**18, 10**400,
)  # fmt: skip
REALS = (
    0.0, -0.0, 0.5, 2.0, 1e-320, 1e-300, 1e300, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
ODD = (None, True, False, [], [[]], [1], [-8] * 4, [1e9] * 4, [2**62] * 9, {}, {"a": 1}, {"type": "x"})
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "F4", "F8_E8M0", "X", "")
BESIDE = (
    ".scale_weight", ".scale", ".weight_scale_inv", ".absmax", ".quant_map", ".nested_absmax", ".qweight",
    "_quantizer._scale",
)  # fmt: skip
RENAMED = ("", "__metadata__", "img_in.weight.scale", "a" * 3000, "double_blocks.99999999999.x", "lora.x")
# keys that would make a library do more than it was asked for, with values for them
DOORS: dict[str, Any] = {
    "_attn_implementation": "owner/repo",
    "attn_implementation": "owner/repo@main:f",
    "_attn_implementation_internal": "owner/repo",
    "_experts_implementation": "owner/repo",
    "auto_map": {"AutoConfig": "owner/repo--module.Config", "AutoModel": "module.Model"},
    "trust_remote_code": True,
    "quantization_config": {"quant_method": "gptq", "modules_to_not_convert": ["x"]},
    "torch_dtype": "os.system",
    "dtype": "x",
    "architectures": ["x.Y"],
    "model_type": "llama",
    "_class_name": ["owner/repo", "Model"],
    "_name_or_path": "owner/repo",
    "__class__": "owner/repo",
    "use_kernels": True,
    "guidance_embeds": True,
    "num_hidden_layers": 10**6,
    "n_layers": 10**6,
    "text_config": {"num_hidden_layers": 10**6},
    "id2label": {"0": "x"},
    "num_labels": 10**9,
}
TOKENIZER_DOORS: dict[str, Any] = {
    "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": []},
    "post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    "added_tokens": [{"id": 2**31, "content": ""}],
    "truncation": {"max_length": 0, "stride": 10**9, "strategy": "LongestFirst", "direction": "Right"},
    "padding": {"strategy": {"Fixed": 10**12}, "pad_id": 0, "pad_type_id": 0, "pad_token": ""},
}
INDEX_DOORS: dict[str, Any] = {"weight_map": {}, "metadata": None}
PUT_IN = (b"\x00", b"\xff\xfe", b"\xff\xfe\x00", b'"', b"}", b"[" * 50, b"\xef\xbb\xbf")
INSTEAD = (
    b"", b"null", b"[]", b"{}", b"{}" * 9, b'"x"', b"0", b"NaN", b"9" * 5000, b"\xff" * 64,
    *(b"[" * 10**n for n in range(2, 6)), *(b'{"a":' * 10**n + b"1" for n in range(2, 5)),
)  # fmt: skip
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig")


# ---------------------------------------------------------------- values and trees


def junk(dice: Dice, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = dice.randrange(8 if depth else 6)
    if kind < 5:
        return deepcopy(dice.choice((NUMBERS, REALS, TEXTS, TEXTS, ODD)[kind]))
    if kind == 5:
        return dice.choice(NUMBERS)
    values = [junk(dice, depth - 1) for _ in range(dice.randrange(4))]
    return values if kind == 6 else {dice.choice(TEXTS): value for value in values}


def near(dice: Dice, value: Any) -> Any:
    """A near value of the same type, or the same value of another type, as a careless check lets pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        real = float(value) if abs(value) < 2**1000 else value
        return dice.choice(
            (value + 1, value - 1, value * 2, value // 2, -value, value * 1000, real, str(value), [value])
        )
    if isinstance(value, str):
        at = dice.randrange(len(value) + 1)
        return dice.choice(
            (value[:at], value[:at] + "x" + value[at:], value.upper(), value * 2, value[::-1], list(value), [value])
        )
    if isinstance(value, list):
        return dice.choice(
            (value[:-1], value * 2, value * 40, value[::-1], [junk(dice, 0) for _ in value], [*value, 1])
        )
    return junk(dice)


def places(tree: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    """Each container of a JSON tree with each of its keys, the outermost first, up to a limit."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(found) < most:
        inside = waiting.pop(0)
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        found += [(inside, key) for key in keys]
        waiting += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    return found


def tree(dice: Dice, value: Any, doors: Mapping[str, Any] | None = None) -> Any:
    """A JSON tree, changed in its meaning at 1 to 3 places; `doors` are keys that may be added at the top."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if doors and isinstance(value, dict) and dice.random() < 0.2:
            key = dice.choice(sorted(doors))
            value[key] = deepcopy(doors[key]) if dice.random() < 0.7 else junk(dice)
            continue
        if not found or dice.random() < 0.02:
            return junk(dice)
        # the top of a deep tree is a small part of it, but the most important one
        inside, key = dice.choice(found if dice.random() < 0.5 else found[:30])
        other, there = dice.choice(found)
        act = dice.randrange(6)
        if act == 0:
            inside[key] = junk(dice)
        elif act in (1, 2):
            inside[key] = near(dice, inside[key])
        elif act == 3:
            inside.pop(key)
        elif act == 4:
            inside[key] = deepcopy(other[there])
        else:
            inside[key], other[there] = deepcopy(other[there]), deepcopy(inside[key])
    return value


# ---------------------------------------------------------------- files


def text(dice: Dice, data: bytes) -> bytes:
    """Bytes, changed as bytes: flipped, cut, put in, in another order or encoding, replaced, nested deeply."""
    act = dice.randrange(14)
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
        return data[:at] + dice.choice((*PUT_IN, data[:50])) + data[at:]
    if act == 10:
        return data.decode(errors="replace").encode(dice.choice(ENCODINGS))
    if act == 11:
        lines = data.splitlines(keepends=True)
        dice.shuffle(lines)
        return b"".join(lines)
    return dice.choice(INSTEAD)


def json_file(doors: Mapping[str, Any] | None = None) -> Callable[[Dice, bytes], bytes]:
    """A mutator of JSON files. It mostly changes their meaning, else their bytes."""

    def mutate(dice: Dice, data: bytes) -> bytes:
        if dice.random() < 0.25:
            return text(dice, data)
        return json.dumps(tree(dice, json.loads(data), doors)).encode("utf-8", "surrogatepass")

    return mutate


def edited(data: bytes, edits: Iterable[Edit]) -> bytes:
    """A safetensors file after `edits`. It ends where an edit left no header to change.

    By bytes: `byte` (at a share of the header, to a value), `cut` (at a share of the file), `length` (of the header, to
    a number). In its meaning, of the tensor with the number `where`: `drop`, `rename` it to a text, `swap` it with
    another number's, `beside` (a scalar with a longer name), `entry`, `dtype`, `shape`, `data_offsets` (to any value),
    `data` (its first byte).
    """
    for what, where, value in edits:
        length = int.from_bytes(data[:8], "little")
        if what == "byte":
            at = int(where * min(len(data), 8 + length))
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif what == "cut":
            data = data[: int(where * len(data))]
        elif what == "length":
            data = value.to_bytes(8, "little") + data[8:]
        else:
            try:
                data = _meant(data, length, what, where, value)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RecursionError):
                continue
    return data


def _meant(data: bytes, length: int, what: str, where: int, value: Any) -> bytes:
    header = json.loads(data[8 : 8 + length])
    names = sorted(header)
    name = names[where % len(names)]
    entry = header[name]
    if what == "data":
        at = 8 + length + entry["data_offsets"][0]
        return data[:at] + bytes([value]) + data[at + 1 :]
    if what == "drop":
        del header[name]
    elif what == "rename":
        header[value] = header.pop(name)
    elif what == "swap":
        other = names[value % len(names)]
        header[name], header[other] = header[other], entry
    elif what == "beside":
        header[name.removesuffix(".weight") + value] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    elif what == "entry":
        header[name] = value
    else:
        entry[what] = value
    return _joined(json.dumps(header).encode("utf-8", "surrogatepass"), data[8 + length :])


def _joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def safetensors(dice: Dice, data: bytes) -> bytes:
    """A safetensors file, changed in its header: in its length, its text or its meaning."""
    length = int.from_bytes(data[:8], "little")
    if dice.random() < 0.2:
        return _joined(text(dice, data[8 : 8 + length]), data[8 + length :])
    if dice.random() < 0.2:
        what = dice.choice(("length", "cut", "byte"))
        value = dice.randrange(256) if what == "byte" else dice.choice(NUMBERS) % 2**64
        return edited(data, [(what, dice.random() ** 3 if what == "cut" else dice.random(), value)])
    header = json.loads(data[8 : 8 + length])
    return edited(data, [_edit(dice, header) for _ in range(dice.choice((1, 1, 2, 3)))])


def _edit(dice: Dice, header: Mapping[str, Any]) -> Edit:
    """A change in the meaning of a header."""
    names = sorted(header)
    where = dice.randrange(len(names))
    name = names[where]
    what = dice.choice(("drop", "rename", "beside", "entry", "swap", *("dtype", "shape", "data_offsets") * 2))
    if what == "rename":
        others = (name + "x", name.replace("0", "7"), "lora." + name)
        return what, where, dice.choice((*others, *others, *RENAMED, dice.choice(TEXTS)))
    if what == "beside":
        return what, where, dice.choice(BESIDE)
    if what == "swap":
        return what, where, dice.randrange(len(names))
    if what == "dtype" and dice.random() < 0.8:
        return what, where, dice.choice(DTYPES)
    if what in ("shape", "data_offsets") and dice.random() < 0.8:
        numbers = [dice.choice(NUMBERS) for _ in range(dice.randrange(4))]
        return what, where, numbers if dice.random() < 0.5 else near(dice, header[name].get(what))
    return what, where, junk(dice)


def gguf(dice: Dice, data: bytes, header: int = 600) -> bytes:
    """A GGUF file, changed in its first `header` bytes: single ones, lengths and counts, or cut."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(min(header, len(changed)))
        act = dice.randrange(4)
        if act == 0:
            changed[at] = dice.randrange(256)
        elif act == 1:
            changed[at] ^= 1 << dice.randrange(8)
        else:  # at first numbers lie at multiples of 4, later anywhere
            at = dice.choice((4, 8, 16, at - at % 4, at))
            size = dice.choice((4, 8))
            changed[at : at + size] = (dice.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    return bytes(changed[: int(dice.random() * len(changed))] if dice.random() < 0.1 else changed)


def words(dice: Dice, data: bytes = b"") -> str:
    """A prompt, or another text that goes into a PNG."""
    parts = [
        dice.choice((*TEXTS, "a red circle", "\\", "'", '"', "<b>", "\x7f", "\x1b[31m", "ÅäÖ", "猫")) for _ in range(4)
    ]
    made = dice.choice(("", " ", "\n")).join(parts[: dice.randint(1, 4)])
    return made * (dice.choice((1, 1, 1, 50, 2000)))


KINDS: dict[str, Callable[[Dice, bytes], bytes]] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "config": json_file(DOORS),
    "tokenizer": json_file(TOKENIZER_DOORS),
    "index": json_file(INDEX_DOORS),
}
