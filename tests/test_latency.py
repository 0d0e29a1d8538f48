"""The stopwatch and the percentiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clock import told_time

from vortex_core.utils import timing
from vortex_core.utils.timing import PERCENTILES, Stopwatch, mark, percentile, samples_needed, summarize

CPU = torch.device("cpu")


def test_phases_are_what_ran_before_their_mark() -> None:
    with told_time() as (clock, _), Stopwatch(CPU) as watch:
        clock.seconds += 0.3
        mark("long")
        mark("nothing")
        clock.seconds += 0.3
        mark("long")
        clock.seconds += 0.2
    assert watch.phases == pytest.approx({"long": 0.6, "nothing": 0.0})
    assert watch.unmarked == pytest.approx(0.2)
    assert watch.seconds == pytest.approx(0.8)


def test_the_device_is_awaited_at_both_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda device: events.append("synchronized"))
    with Stopwatch(CPU):
        for _ in range(3):
            events.append("work")
            mark("phase")
    assert events == ["synchronized", *["work"] * 3, "synchronized"]


def test_a_mark_outside_a_stopwatch_is_nobodys() -> None:
    mark("before")
    with Stopwatch(CPU) as watch:
        pass
    mark("after")
    assert watch.phases == {}


def test_an_inner_stopwatch_takes_the_marks_and_gives_them_back() -> None:
    with Stopwatch(CPU) as outer:
        with Stopwatch(CPU) as inner:
            mark("inside")
        mark("outside")
    assert list(inner.phases) == ["inside"]
    assert list(outer.phases) == ["outside"]


def test_what_is_cancelled_leaves_no_stopwatch_running() -> None:
    watch = Stopwatch(CPU)
    with pytest.raises(KeyboardInterrupt), watch:
        raise KeyboardInterrupt
    mark("later")
    assert watch.phases == {}


def test_percentiles_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        samples = rng.lognormal(size=rng.integers(1, 400))
        q = float(rng.choice(PERCENTILES))
        assert percentile(list(samples), q).seconds == np.percentile(samples, q, method="inverted_cdf")


@pytest.mark.parametrize("q", [50.0, 90.0, 99.0])
def test_the_interval_is_what_resampling_gives(q: float) -> None:
    rng = np.random.default_rng(1)
    samples = rng.lognormal(sigma=0.2, size=60)
    resampled = np.percentile(rng.choice(samples, (20_000, 60)), q, axis=1, method="inverted_cdf")
    low, high = np.quantile(resampled, (0.025, 0.975))
    found = percentile(list(samples), q)
    ranks = np.searchsorted(np.sort(samples), (found.low, low, found.high, high))
    assert abs(ranks[0] - ranks[1]) <= 1  # resampling itself is off by one of the 60 now and then
    assert abs(ranks[2] - ranks[3]) <= 1
    assert found.low <= found.seconds <= found.high


def test_the_interval_holds_the_true_percentile() -> None:
    rng = np.random.default_rng(2)
    found = [percentile(list(rng.normal(10, 1, 80)), 50) for _ in range(500)]
    inside = sum(p.low <= 10 <= p.high for p in found)
    assert 0.91 <= inside / 500 <= 0.99


def test_few_samples_support_few_percentiles() -> None:
    assert [samples_needed(q) for q in PERCENTILES] == [5, 29, 59, 299, 2995]
    supported = {p.q: p.supported for p in summarize([1.0 + i / 100 for i in range(50)]).percentiles}
    assert supported == {50: True, 90: True, 95: False, 99: False, 99.9: False}


@pytest.mark.gpu
def test_work_that_was_only_launched_counts_where_it_was_launched() -> None:
    device = torch.device("cuda", 0)
    cycles = 200_000_000
    with Stopwatch(device):
        torch.cuda._sleep(cycles)  # the first launch loads the kernel
    side = torch.cuda.Stream(device)
    with Stopwatch(device) as watch:
        mark("before")
        torch.cuda._sleep(cycles)  # which returns at once
        mark("kernel")
        mark("after")
        with torch.cuda.stream(side):
            torch.cuda._sleep(3 * cycles)
    # which is most, not how long: the kernel takes tens of milliseconds, a launch some microseconds
    assert watch.phases["kernel"] > watch.phases["before"] + watch.phases["after"]
    assert watch.unmarked > watch.phases["before"] + watch.phases["after"]  # the other stream's, after the last mark
    assert watch.seconds >= sum(watch.phases.values())
