"""The leak check: what leaks is found, what does not is not accused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vortex_core import Engine, VortexInputError
from vortex_core.bench import leak
from vortex_core.bench.leak import BOUND, FEWEST, trend
from vortex_core.bench.readings import Counters, at_rest
from vortex_core.bench.verdict import exit_code

SIZES = [(64, 64), (96, 64), (64, 80)]
MB = 1_000_000
HELD: list[torch.Tensor] = []


def leaking(device: torch.device) -> Counters:
    """The counters of an engine that keeps 1 MB of each picture."""
    HELD.append(torch.ones(MB // 4))
    return at_rest(device)


@pytest.mark.slow
def test_a_leak_of_1_mb_a_picture_is_found_within_50(engine: Engine) -> None:
    try:
        report = leak.run(engine, SIZES, 50, read=leaking, steps=1)
    finally:
        HELD.clear()
    (found,) = report.trends
    assert found.verdict.state == "fail"
    assert 0.7 * MB < found.slope < 1.4 * MB
    assert exit_code(report.verdicts) == 1


@pytest.mark.slow
def test_a_clean_engine_is_not_accused(engine: Engine) -> None:
    report = leak.run(engine, SIZES, 30, steps=1)
    assert [verdict.state for verdict in report.verdicts] == ["pass"]
    assert "96 x 64" in report.title


@pytest.mark.slow
def test_a_clean_engine_is_not_accused_in_10_checks(engine: Engine) -> None:
    report = leak.run(engine, [(64, 64), (80, 64)], 10 * FEWEST, steps=1)
    assert [verdict.state for verdict in report.verdicts] == ["pass"]
    (found,) = report.trends  # on the CPU there is one counter
    checks = [found.readings[first : first + FEWEST] for first in range(0, 10 * FEWEST, FEWEST)]
    assert [trend(found.counter, check).verdict.state for check in checks] == ["pass"] * 10


def test_counters_that_jump_about_are_not_accused() -> None:
    # a process' memory as allocators move it: steps up and down, now and then a plateau
    rng = np.random.default_rng(0)
    accused = 0
    for _ in range(500):
        level = rng.choice([-4, -2, 0, 0, 0, 2, 4], 50) * MB + rng.normal(0, 0.3 * MB, 50)
        accused += trend("host", [int(reading) for reading in 5e8 + level]).verdict.state == "fail"
    assert accused == 0


def test_one_megabyte_a_picture_is_found_among_them() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        level = rng.choice([-4, -2, 0, 0, 0, 2, 4], 50) * MB + np.arange(50) * MB
        assert trend("host", [int(reading) for reading in 5e8 + level]).verdict.state == "fail"


@pytest.mark.parametrize(
    ("readings", "state"),
    [
        ([5] * 50, "pass"),
        ([5] * 19, "undecided"),
        ([i * 2 * MB for i in range(10)], "fail"),  # so steep that few suffice
        ([0] * 25 + [BOUND[0] + 1] * 25, "fail"),  # one jump over the bound
        ([0] * 25 + [BOUND[0] // 2] * 25, "pass"),
        ([i * 100 for i in range(50)], "pass"),
    ],
)
def test_verdicts(readings: list[int], state: str) -> None:
    assert trend("torch allocated", readings).verdict.state == state


def test_an_interrupt_keeps_what_was_measured(engine: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    report = leak.run(engine, SIZES, 50, on_picture=interrupt, steps=1)
    assert report.interrupted
    assert len(report.trends[0].readings) == 5


def test_a_slope_takes_two_pictures() -> None:
    with pytest.raises(VortexInputError, match="at least two pictures"):
        trend("host", [5])
