"""2,000 hostile inputs of every kind, by tools/hardening/fuzz.py; 50,000: `python tools/hardening/fuzz.py --help`."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import mutators
import pytest

# the others load an engine each: ten times the time
INPUTS = {("safetensors", "gguf"): 1700, ("config", "tokenizer", "index", "png", "workflow"): 300}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # forks beside threads
@pytest.mark.parametrize("kinds", INPUTS)
def test_2000_hostile_inputs_are_read_or_refused_in_words(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    figures = fuzz.run(INPUTS[kinds], list(kinds), seed=0, save=tmp_path)
    assert figures["such_as"] == []
    assert figures["holds"]


def hang() -> None:
    time.sleep(60)


def work() -> None:
    while True:
        pass


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def memory() -> None:
    bytearray(2 * fuzz.GB)


def error() -> None:
    raise KeyError("not ours")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("end", "said"),
    [
        (hang, "took more than a minute"),
        (work, "of a core's time"),
        (crash, "ended the process (-9)"),
        (memory, "MemoryError"),
        (error, "KeyError at"),
    ],
)
def test_what_is_wrong_is_named_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: Callable[[], None], said: str
) -> None:
    """Of 12 inputs 2 end badly; the others are fed all the same."""
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setattr(fuzz, "MINUTE", 2.0 if end is hang else 60.0)

    class Target:
        def __init__(self, folder: Path) -> None: ...

        def data(self, kind: str, dice: random.Random) -> tuple[bytes, str]:
            return str(dice).encode(), "a.json"

        def feed(self, kind: str, data: bytes, where: str, scratch: Path) -> None:
            if data in (b"3", b"8"):
                end()

    monkeypatch.setattr(fuzz, "Target", Target)
    monkeypatch.setattr(fuzz, "numbered", lambda seed, kind, number: number)
    figures = fuzz.run(12, ["config"], seed=0, save=tmp_path, say=lambda line: None)
    assert figures["wrong"] == 2
    assert all(said in line for line in figures["such_as"])
    assert sum(figures["outcomes"]["config"].values()) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config-3-a.json", "config-8-a.json"]


@pytest.mark.parametrize("kind", ["config", "tokenizer", "index"])
def test_mutators_repeat_and_change(kind: str) -> None:
    sound = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None, "d": True}, "e": 3}).encode()
    made = [[mutators.KINDS[kind](random.Random(n), sound) for n in range(200)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 150
