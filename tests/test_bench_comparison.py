"""The regression test, on runs that were recorded: how often it cries wolf, and what it finds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import iqr

from vortex_core import VortexInputError
from vortex_core.bench.rank_tests import Comparison, compare, compare_pairs
from vortex_core.bench.verdict import exit_code
from vortex_core.bench.workload import ITERATIONS

RECORDED = json.loads((Path(__file__).parent / "data" / "recorded-runs.json").read_text())
NAMES = [run["what"] for run in RECORDED]
REPEATS = 500


def noise(seconds: list[float]) -> float:
    """Relative deviation of the bulk; tails do not count."""
    return float(iqr(np.log(seconds), scale="normal"))


def states(seconds: list[float], slower: float, test: Callable[..., Comparison]) -> list[str]:
    """Verdicts of comparisons of two sets drawn from one run, the second slowed down."""
    rng = np.random.default_rng(0)
    return [
        test(rng.choice(seconds, ITERATIONS), (1 + slower) * rng.choice(seconds, ITERATIONS)).verdict().state
        for _ in range(REPEATS)
    ]


@pytest.mark.parametrize("test", [compare, compare_pairs])
@pytest.mark.parametrize("run", RECORDED, ids=NAMES)
def test_false_alarms_are_rare(run: dict[str, list[float]], test: Callable[..., Comparison]) -> None:
    found = states(run["seconds"], 0.0, test)
    assert found.count("fail") < 0.02 * REPEATS
    assert "undecided" not in found


CALM = [run for run in RECORDED if noise(run["seconds"]) < 0.04]


@pytest.mark.parametrize("run", CALM, ids=[run["what"] for run in CALM])
def test_a_slow_down_of_5_percent_is_found(run: dict[str, list[float]]) -> None:
    assert states(run["seconds"], 0.05, compare).count("fail") >= 0.95 * REPEATS


@pytest.mark.parametrize("run", RECORDED, ids=NAMES)
def test_what_is_said_to_be_detectable_is_detected(run: dict[str, list[float]]) -> None:
    rng = np.random.default_rng(1)
    said = statistics.median(
        compare(rng.choice(run["seconds"], ITERATIONS), rng.choice(run["seconds"], ITERATIONS)).detectable()
        for _ in range(50)
    )
    assert states(run["seconds"], said, compare).count("fail") >= 0.85 * REPEATS


@pytest.mark.parametrize("test", [compare, compare_pairs])
def test_a_change_is_sized_and_sure(test: Callable[..., Comparison]) -> None:
    rng = np.random.default_rng(3)
    before = rng.lognormal(sigma=0.02, size=50)
    found = test(before, 1.1 * rng.lognormal(sigma=0.02, size=50))
    assert found.low < 0.1 < found.high
    assert found.change == pytest.approx(0.1, abs=0.02)
    assert found.p_value < 1e-6
    assert found.slower > 0.9
    assert test(1.1 * before, before).verdict().state == "pass"  # faster is no regression


def test_a_change_below_the_threshold_passes_however_sure() -> None:
    before = [1.0 + i / 1e6 for i in range(50)]
    found = compare_pairs(before, [s * 1.01 for s in before])
    assert found.p_value < 1e-6
    assert found.verdict().state == "pass"
    assert found.verdict(threshold=0.005).state == "fail"


def test_pairs_see_through_what_meets_both() -> None:
    rng = np.random.default_rng(4)
    weather = rng.lognormal(sigma=0.3, size=50)  # the machine slows down and speeds up
    before, after = weather * rng.lognormal(sigma=0.01, size=50), weather * rng.lognormal(0.05, 0.01, size=50)
    assert compare_pairs(before, after).verdict().state == "fail"
    assert compare(before, after).verdict().state == "pass"


def test_few_samples_are_undecided() -> None:
    verdict = compare([1.0] * 50, [2.0] * 9).verdict()
    assert verdict.state == "undecided"
    assert exit_code([verdict]) == 3
    assert compare_pairs([1.0] * 20, [1.0] * 20).verdict().state == "pass"


@pytest.mark.parametrize("seconds", [[], [0.0], [-1.0], [float("nan")]])
def test_what_is_no_time_is_refused(seconds: list[float]) -> None:
    with pytest.raises(VortexInputError, match="every time above 0"):
        compare([1.0], seconds)
