"""A tokenizer from a file that is not trusted: its parts are checked, then it is built.

`tokenizers` compiles whatever patterns a file has. A file it does not expect makes it panic in Rust, which is no
`Exception`, and a file can have it make a gigabyte of a prompt. So files are checked first: patterns must not
backtrack, texts must not grow without bound, and tokens must not be random.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from ..errors import VortexCheckpointError, quoted
from .strict_json import unambiguous

LARGEST = 8 * 10**6  # bytes of a file; released ones have 2.5 MB, indented ones 4 MB
LONGEST = 128  # characters of a token; T5's longest has 16
LETTERS = 10**6  # characters of all tokens together; a table of them takes 400 bytes for each
RULES = 4000  # characters of the rules around the vocabulary, as JSON; CLIP's have 900
TEMPLATE = 8  # tokens that are put around a text, at most
GROWTH = 256  # times that a normalizer may lengthen a text, at most
CHARACTER = 64  # bytes that a table may put for one character, at most; Unicode's longest has 33
MODELS = (models.BPE, models.Unigram)  # CLIP's and T5's; others can take forever on a long word
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Alternatives of single characters, of which only the last may repeat: such a pattern never backtracks.
_ONE = r"(?:\\[pP]\{\^?\w+\}|\\[^\d]|\[(?:\\[pP]\{\^?\w+\}|\\[^\d]|[^\\\[\]])+\]|[^\\()\[\]{}*+?|])"
_BRANCH = rf"{_ONE}*(?:{_ONE}(?:[*+?]|\{{\d{{1,2}}(?:,\d{{0,2}})?\}}))?"
STEADY = re.compile(rf"{_BRANCH}(?:\|{_BRANCH})*")


def build(text: str, where: Path | str) -> Tokenizer:
    """The tokenizer that a tokenizer.json's `text` describes, without padding and truncation.

    Raises `VortexCheckpointError` where it is damaged, of another kind, or unsafe.
    """
    if len(text) > LARGEST:
        raise _wrong(where, f"it has more than {LARGEST // 10**6} MB")
    with guarded(where):
        _check(unambiguous(text), where)
        return _finished(Tokenizer.from_str(text), where)


def _finished(tokenizer: Tokenizer, where: Path | str) -> Tokenizer:
    if not isinstance(tokenizer.model, MODELS):
        raise _wrong(where, f"it is a {type(tokenizer.model).__name__}, and CLIP's is a BPE, T5's a Unigram")
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None  # else a prompt would give other tokens each time
    tokenizer.no_padding()  # a file keeps those of its last user
    tokenizer.no_truncation()
    around = [tokenizer.encode(words).ids for words in ("", "a", "b c")]
    if not 0 < len(around[0]) <= TEMPLATE or len({ids[-1] for ids in around}) > 1:
        raise _wrong(where, "it does not put one end token after every text")
    return tokenizer


def build_clip(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], where: Path | str) -> Tokenizer:
    """CLIP's tokenizer from the words and merges of its older form, built as transformers does."""
    with guarded(where):
        for word in (START, END):
            if word not in vocabulary:
                raise _wrong(where, f"it lacks {word}")
        model = models.BPE(
            vocab=dict(vocabulary),
            merges=[(first, second) for first, second in merges],
            unk_token=END,
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.post_processor = processors.RobertaProcessing(
            (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
        )
        tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (START, END)])
        return _finished(tokenizer, where)


def read_pair(folder: Path) -> Tokenizer:
    """CLIP's tokenizer from `vocab.json` and `merges.txt`."""
    file = folder / "vocab.json"
    vocabulary = parse(read_text(file), file)
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise _wrong(file, "it does not give numbers to words")
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in merges):
        raise _wrong(folder / "merges.txt", "it does not hold pairs")
    return build_clip(vocabulary, merges, folder)  # type: ignore[arg-type]


def read_text(path: Path) -> str:
    """A file's text. Raises `VortexCheckpointError` where it is no text, or has more than `LARGEST` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise _wrong(path, f"it has more than {LARGEST // 10**6} MB")
        return data.decode()
    except PermissionError as error:
        raise VortexCheckpointError(
            f"{path} may not be read by this user ({error}). Change its permissions, or its owner.", path=str(path)
        ) from error
    except (OSError, ValueError) as error:
        raise _wrong(path, str(error)) from error


def parse(text: str, where: Path | str) -> Any:
    """JSON. Raises `VortexCheckpointError`."""
    with guarded(where):
        return unambiguous(text)


@contextmanager
def guarded(where: Path | str) -> Iterator[None]:
    """Turn whatever `tokenizers` raises into a `VortexCheckpointError` that names the tokenizer."""
    try:
        yield
    except VortexCheckpointError:
        raise
    except BaseException as error:
        # a panic in Rust is no Exception, and its class cannot be imported
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _wrong(where, quoted(str(error) or type(error).__name__)) from error
        raise


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """`text` in tokens. Raises `VortexCheckpointError` where the tokenizer fails."""
    with guarded("The model's tokenizer"):
        return tokenizer.encode(text)


def token_count(tokenizer: Tokenizer) -> int:
    """How many embeddings the tokens need: their highest number, plus one."""
    with guarded("The model's tokenizer"):
        return 1 + max((*tokenizer.get_vocab().values(), *tokenizer.encode("").ids))


def _check(file: Any, where: Path | str) -> None:
    """Raise `VortexCheckpointError` for parts that could take forever, or all memory."""
    growth, table = 1, ""
    for part in _parts([file.get("normalizer"), file.get("pre_tokenizer")]):
        kind, pattern = part.get("type"), part.get("pattern")
        regex = pattern.get("Regex", "") if isinstance(pattern, dict) else ""
        if not STEADY.fullmatch(regex):
            raise _wrong(where, f"its pattern {quoted(regex)} could take for ever")
        if kind == "Replace":
            growth *= 1 + len(part["content"])
        elif kind == "ByteLevel":
            growth *= 2
        elif kind == "Precompiled":
            growth *= GROWTH if table else 1
            table = part.pop("precompiled_charsmap")
            growth *= 1 if _widest(table) <= CHARACTER else 2 * GROWTH
    if growth > GROWTH:
        raise _wrong(where, "it makes texts longer and longer")
    if any(len(json.dumps(file.get(key))) > RULES for key in ("normalizer", "pre_tokenizer", "post_processor")):
        raise _wrong(where, f"it has more rules than {RULES} characters")
    words = file["model"].get("vocab", ())
    words = words if isinstance(words, dict) else [word for word, _ in words]
    added = [token["content"] for token in file.get("added_tokens") or ()]
    lengths = [len(word) for word in (*words, *added)]
    if max(lengths, default=0) > LONGEST or sum(lengths) > LETTERS:
        raise _wrong(where, f"it has tokens of more than {LONGEST} characters, or of more than {LETTERS} together")


def _parts(waiting: list[Any]) -> Iterator[dict[str, Any]]:
    """Every JSON object inside `waiting`."""
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _widest(table: str) -> int:
    """Bytes of the longest text that a table puts for one character. It is a size, a trie, and texts that end in 0."""
    data = base64.b64decode(table)
    start = 4 + int.from_bytes(data[:4], "little")
    if not 4 < start < len(data):
        raise ValueError("its table of characters is damaged")
    return max(len(text) for text in data[start:].split(b"\0"))


def _wrong(where: Path | str, what: str) -> VortexCheckpointError:
    path = str(where) if isinstance(where, Path) else None
    return VortexCheckpointError(f"{where} is not a readable tokenizer file: {what}. Download it again.", path=path)
