"""Streams are made once, and cuBLAS' workspaces are counted and noticed when they move, against a stand-in."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vortex_core.device import streams as module
from vortex_core.device.streams import Blas, streams_of

CPU = torch.device("cpu")


class Card:
    """Workspaces of 32 bytes a stream, among 1000 of others; streams are names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spaces: set[str] = set()
        self.others = 1000
        self.products = 0
        self.blas = Blas(torch.device("cuda", 0))
        self.blas._factors = (torch.empty(0),)
        monkeypatch.setattr(module, "counters", lambda device: SimpleNamespace(allocated=self.allocated))
        monkeypatch.setattr(self.blas, "_default", lambda: ("default",))
        monkeypatch.setattr(self.blas, "multiply", self.multiply)

    @property
    def allocated(self) -> int:
        return self.others + 32 * len(self.spaces)

    def multiply(self, stream: str) -> None:
        self.products += 1
        self.spaces.add(stream)

    def ensure(self, *streams: Any) -> int:
        self.blas.ensure(streams)
        return self.blas.generation


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def test_streams_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    streams = streams_of(torch.device("cuda"))
    assert streams is not None
    assert len({id(stream) for stream in streams}) == 3
    assert streams_of(torch.device("cuda:0")) is streams
    assert streams_of(torch.device("cuda:1")) is not streams
    assert streams_of(CPU) is None


def test_workspaces_are_counted_by_stream(card: Card) -> None:
    card.ensure("side")
    assert (card.blas.nbytes(["side"]), card.blas.nbytes([])) == (64, 32)  # type: ignore[list-item]
    card.ensure("side", "copy")
    assert card.blas.nbytes(["side", "side", "copy"]) == 96  # type: ignore[list-item]


def test_one_product_tells_that_all_are_where_they_were(card: Card) -> None:
    assert card.ensure("side") == 1
    before = card.products
    assert card.ensure("side") == 1
    assert card.products == before + 1


def test_workspaces_that_were_cleared_are_another_generation(card: Card) -> None:
    assert card.ensure("side") == 1
    card.spaces.clear()
    assert card.ensure("side") == 2
    assert card.spaces == {"default", "side"}
    assert card.blas.nbytes(["side"]) == 64  # type: ignore[list-item]
    assert card.ensure("side") == 2


def test_less_memory_counts_as_well(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.ensure("side") == 1
    readings = iter((1000, 900, 900, 900, 900))
    monkeypatch.setattr(module, "counters", lambda device: SimpleNamespace(allocated=next(readings)))
    assert card.ensure("side") == 2


def test_what_stays_of_a_thread_that_ended_keeps_its_size(card: Card) -> None:
    card.ensure()
    card.blas.generation = 0
    card.ensure("side")  # the default stream's were there already
    assert card.blas.nbytes(["side"]) == 64  # type: ignore[list-item]


def test_the_products_are_valid_and_the_cpu_has_no_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    blas = Blas(CPU)
    blas.ensure([])
    assert (blas.generation, blas.nbytes([])) == (0, 0)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(blas, "_default", lambda: (None,))
    blas.ensure([])
    bias, x, w, out = blas._factors
    assert (bias.ndim, x.shape, w.shape, out.shape) == (1, (16, 16), (16, 16), (16, 16))
    assert blas.generation == 1
