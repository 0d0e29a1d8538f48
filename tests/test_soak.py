"""A short soak, and that it sees what it looks for. The long one: `python tools/hardening/soak.py --help`."""

from __future__ import annotations

from pathlib import Path

import micro_model
import pytest
import soak
import torch
from torch import Tensor

from vortex_core import Engine


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_model.write(tmp_path_factory.mktemp("micro") / "micro")


@pytest.mark.slow
def test_40_mixed_calls_from_3_threads(micro: Path) -> None:
    figures = soak.run(lambda: Engine.load(micro, device="cpu"), 40, 20, largest=96, threads=3, seed=2, room=64.0)
    assert figures["broken"] == []
    assert figures["checked"] == 2
    ended = " ".join(figures["outcomes"])
    for kind in ("Injected", "KeyboardInterrupt", "DeadlineError", "CancelledError", "MemoryPressureError"):
        assert kind in ended


def test_a_seed_says_what_every_call_is() -> None:
    calls = [[soak.Call.of(seed, n, 128, sound=False) for n in range(300)] for seed in (1, 1, 2)]
    assert calls[0] == calls[1] != calls[2]
    assert {call.end for call in calls[0]} == set(soak.ENDS)


class Forgetful:
    """An engine whose pictures are not those of a fresh one, or that keeps them."""

    device = torch.device("cpu")
    kept: list[Tensor]

    def __init__(self) -> None:
        self.kept = []

    def generate(self, prompt: str, *, batch_size: int, height: int, width: int, **options: object) -> Tensor:
        picture = torch.rand(batch_size, height, width, 3)
        self.kept.append(torch.ones(3 * 10**6))
        return picture

    def __enter__(self) -> Forgetful:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def unload(self) -> None: ...


def test_wrong_pictures_and_memory_that_stays_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ENDS", {"done": (1, ())})
    figures = soak.run(Forgetful, 6, 2, largest=64, threads=1, seed=0, room=8.0)  # type: ignore[arg-type]
    assert not figures["holds"]
    found = " ".join(figures["broken"])
    assert "call 1: differs from a fresh engine's" in found
    assert "rss_mb grew from" in found
