"""Tokenizers of any content: CLIP's and T5's, or refused in words, at once."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Encoding, Tokenizer

from vortex_core import Engine, PromptSyntaxWarning, PromptTruncatedWarning, VortexCheckpointError
from vortex_core.checkpoint.tokenizer import read_tokenizer, tokenizer_of
from vortex_core.flux1.text_encoders import ENOUGH, tokenize
from vortex_core.storage import vocabulary
from vortex_core.storage.vocabulary import STEADY, build, encode

DRAW = {"seed": 1, "height": 64, "width": 64, "steps": 1}
TEXT = "A red  circle\n don't"


@pytest.fixture(scope="module")
def clip(tiny_dir: Path) -> dict[str, Any]:
    return json.loads((tiny_dir / "tokenizer" / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def t5(tiny_dir: Path) -> dict[str, Any]:
    return json.loads((tiny_dir / "tokenizer_2" / "tokenizer.json").read_text())


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def steps(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(normalizers)}}


def table(trie: bytes, texts: bytes) -> dict[str, Any]:
    data = base64.b64encode(len(trie).to_bytes(4, "little") + trie + texts).decode()
    return steps({"type": "Precompiled", "precompiled_charsmap": data})


def template(*parts: str, ids: int = 1) -> dict[str, Any]:
    single = [{"Sequence": {"id": "A", "type_id": 0}} if part == "A" else {"SpecialToken": {"id": part, "type_id": 0}}
              for part in parts]  # fmt: skip
    special = {"z": {"id": "z", "ids": [1] * ids, "tokens": ["z"] * ids}}
    return {"post_processor": {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}}


SPLIT = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}
WORDPIECE = {
    "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**9,
    "vocab": {"a": 0, "##a": 1},
}  # fmt: skip
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern that backtracks": (steps(replace({"Regex": "(a+)+$"}, " ")), "could take for ever"),
    "a split that backtracks": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a|aa)+$"}}}, "could take for ever"),
    "doubled thirty times": (steps(*[replace({"String": "a"}, "aa")] * 30), "longer and longer"),
    "bytes of bytes": (steps(*[{"type": "ByteLevel"}] * 30), "longer and longer"),
    "a table that grows": (table(b"\1\0\0\0" * 256, b"x" * 100_000 + b"\0"), "longer and longer"),
    "a table that is none": (table(b"", b""), "table of characters is damaged"),
    "a table of three bytes": (
        steps({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "table of characters is damaged",
    ),
    "a panic while building": (table(b"\xff" * 1024, b"ab\0"), "is not a readable tokenizer file"),
    "a panic of an empty pattern": (steps(replace({"String": ""}, "x")), "is not a readable tokenizer file"),
    "a long beginning": (steps({"type": "Prepend", "prepend": "x" * 10_000}), "more rules than"),
    "three thousand splits": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT] * 3000}}, "more rules"),
    "words of quadratic time": ({"model": WORDPIECE}, "it is a WordPiece"),
    "no end token": (template("A"), "does not put one end token after every text"),
    "an end token at the beginning": (template("z", "A"), "does not put one end token after every text"),
    "many end tokens": (template("A", "z", ids=50), "does not put one end token after every text"),
    "a long token": ({"added_tokens": [{"id": 7, "content": "x" * 500, "special": True}]}, "tokens of more than"),
    "words that are none": ({"model": {"type": "BPE", "vocab": [], "merges": 3}}, "is not a readable tokenizer file"),
    "no model": ({"model": None}, "is not a readable tokenizer file"),
}
BUILT = {  # what only the tokenizer itself shows; all else is refused before there is one
    "a panic while building", "a panic of an empty pattern", "words of quadratic time", "words that are none",
    "no end token", "an end token at the beginning", "many end tokens",
}  # fmt: skip


class Watched:
    """Stands for `Tokenizer` and the one that it builds: what was built, and of how many characters it was asked."""

    def __init__(self) -> None:
        self.built = self.characters = 0

    def from_str(self, text: str) -> Watched:
        self.built += 1
        self.real = Tokenizer.from_str(text)
        return self

    def encode(self, text: str) -> Encoding:
        self.characters += len(text)
        return self.real.encode(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_would_take_for_ever_or_all_memory(
    tmp_path: Path, clip: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, sentence = HOSTILE[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(clip | changes))
    monkeypatch.setattr(vocabulary, "Tokenizer", watched := Watched())
    with pytest.raises(VortexCheckpointError, match=sentence) as refusal:
        encode(read_tokenizer(tmp_path), "a" * 1000)
    assert watched.built == (case in BUILT)
    assert watched.characters <= len("" + "a" + "b c")  # the samples, and never a prompt
    assert refusal.value.path == str(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "[]", "null", '"x"', "{}", '{"model": 1, "model": 2}', " " * 9_000_000]
)
def test_files_that_are_no_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(VortexCheckpointError, match=r"tokenizer\.json is not a readable tokenizer file.*Download it"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", [r"\s+", " {2,}", r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", r"<\|end\|>|\p{L}+"])
def test_patterns_that_never_step_back_are_taken(pattern: str) -> None:
    assert STEADY.fullmatch(pattern)


@pytest.mark.parametrize("pattern", ["(a+)+", "a*a*b", "(a)\\1", "a(?=b)", "a{9999}", "(?:a|b)*c", "a+b", "[a", "a++"])
def test_patterns_that_may_are_not(pattern: str) -> None:
    assert not STEADY.fullmatch(pattern)


def test_the_same_tokens_each_time(clip: dict[str, Any]) -> None:
    """A file may ask for merges to be skipped at random."""
    chancy = build(json.dumps(clip | {"model": clip["model"] | {"dropout": 0.5}}), "it")
    assert encode(chancy, TEXT).ids == encode(build(json.dumps(clip), "it"), TEXT).ids


def test_a_token_beyond_the_embeddings(tmp_path: Path, tiny_dir: Path, clip: dict[str, Any]) -> None:
    for folder in ("tokenizer", "tokenizer_2"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tokenizer_2" / "tokenizer.json").symlink_to(tiny_dir / "tokenizer_2" / "tokenizer.json")
    far = template("A", "z")
    far["post_processor"]["special_tokens"]["z"]["ids"] = [4_000_000_000]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(clip | far))
    with pytest.raises(VortexCheckpointError, match="690 tokens and its tokenizer has 4000000001"):
        Engine.load(tiny_dir, device="cpu", tokenizers=tmp_path)


def test_a_tokenizer_that_fails_at_a_prompt(t5: dict[str, Any]) -> None:
    silent = build(json.dumps(t5 | {"model": t5["model"] | {"unk_id": None, "byte_fallback": False}}), "it")
    with pytest.raises(VortexCheckpointError, match="unk_id"):
        encode(silent, "\u2603")


def pair(folder: Path, clip: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokenizer in its older form, in `folder`; its words and merges."""
    merges = [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in clip["model"]["merges"]]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
    return clip["model"]["vocab"], merges


def test_the_older_pair_is_the_same_tokenizer(tmp_path: Path, clip: dict[str, Any]) -> None:
    pair(tmp_path / "tokenizer", clip)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "tokenizer" / name).write_text("{")  # of no use here
    old, new = read_tokenizer(tmp_path / "tokenizer"), build(json.dumps(clip), "it")
    for text in ("", TEXT, "\u00dc\u2603 <|endoftext|> 42", "x" * 300):
        assert encode(old, text).ids == encode(new, text).ids
        assert encode(old, text).offsets == encode(new, text).offsets


def test_the_older_pair_agrees_with_transformers(tmp_path: Path, clip: dict[str, Any]) -> None:
    from transformers import CLIPTokenizerFast

    pair(tmp_path, clip)
    theirs = Tokenizer.from_str(CLIPTokenizerFast.from_pretrained(tmp_path).backend_tokenizer.to_str())
    for text in ("", TEXT, "e\u0301 \u00df 3d, we'll", "\U0001f3a8 \ufb01"):
        assert encode(read_tokenizer(tmp_path), text).ids == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("file", "text"),
    [("vocab.json", '{"a": 0, '), ("vocab.json", '{"a": "x"}'), ("vocab.json", "{}"), ("merges.txt", "a b c\n"),
     ("merges.txt", "zz qq\n"), ("vocab.json", "[" * 100_000)],
)  # fmt: skip
def test_an_older_pair_that_is_damaged(tmp_path: Path, clip: dict[str, Any], file: str, text: str) -> None:
    pair(tmp_path, clip)
    (tmp_path / file).write_text(text)
    with pytest.raises(VortexCheckpointError, match="is not a readable tokenizer file") as refusal:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in (refusal.value.path or "")


class Slow:
    """What transformers 4 gives a pipeline for CLIP: words and ranked merges, and nothing of `tokenizers`."""

    def __init__(self, words: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self.encoder, self.bpe_ranks = words, {merge: rank for rank, merge in enumerate(merges)}


def test_slow_tokenizers(tmp_path: Path, tiny_dir: Path, clip: dict[str, Any]) -> None:
    found = tokenizer_of(Slow(*pair(tmp_path, clip)), "The pipeline's tokenizer")
    assert encode(found, TEXT).ids == encode(build(json.dumps(clip), "it"), TEXT).ids
    named = type("Slower", (), {"name_or_path": str(tiny_dir / "tokenizer_2")})()
    assert encode(tokenizer_of(named, "it"), TEXT).ids == encode(read_tokenizer(tiny_dir / "tokenizer_2"), TEXT).ids
    with pytest.raises(VortexCheckpointError, match=r"is object, which Vortex cannot read.*fast tokenizer"):
        tokenizer_of(object(), "The pipeline's tokenizer")


def test_long_prompts_are_read_as_far_as_they_count(tiny_dir: Path) -> None:
    tokenizer = read_tokenizer(tiny_dir / "tokenizer_2")
    words = "a red circle, " * 10_000
    whole = tokenizer.encode(words)
    found = tokenize(tokenizer, words, 256)
    assert found.ids == (*whole.ids[:255], whole.ids[-1])
    assert found.lost == words[whole.offsets[255][0] :].strip()
    sparse = " " * ENOUGH + "a red circle"
    assert tokenize(tokenizer, sparse, 256).ids == tokenize(tokenizer, "a red circle", 256).ids


def test_a_lost_text_is_not_repeated_whole(engine: Engine) -> None:
    with pytest.warns(PromptTruncatedWarning) as said:
        engine.encode("red " * 30_000 + "tail")
    assert len(str(said[0].message)) < 500


@pytest.mark.parametrize(
    ("prompt", "notes"),
    [
        ("a (red:1.2) circle, (blue:.5)", ["(red:1.2)"]),
        ("a circle, embedding:easynegative", ["embedding:easynegative"]),
        ("a circle BREAK a square", ["BREAK"]),
        ("(a:1) embedding:b BREAK", ["(a:1)", "embedding:b", "BREAK"]),
        (r"a \(red:1.2\) circle [at noon] breaks (quietly): 3", []),
        ("(" * 5000 + ":" * 5000 + "1" * 5000, []),
    ],
)  # fmt: skip
def test_syntax_of_other_programs_is_said_to_be_taken_literally(engine: Engine, prompt: str, notes: list[str]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine.encode(prompt)
    found = [str(one.message) for one in said if issubclass(one.category, PromptSyntaxWarning)]
    assert [note in message for note, message in zip(notes, found, strict=True)] == [True] * len(notes)
    assert all("is taken literally" in message for message in found)


def test_an_empty_prompt_draws(engine: Engine) -> None:
    empty, blank = (engine.generate(prompt, **DRAW) for prompt in ("", " \n"))
    assert torch.equal(empty, blank)
    assert bool(empty.isfinite().all())
    assert not torch.equal(empty, engine.generate("a red circle", **DRAW))
