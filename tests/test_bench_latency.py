"""Timed pictures of the miniature: injected delays show up where they were injected."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from engine_parts import painter_of

from vortex_core import Engine, VortexInputError, load_flux_schnell, sampling
from vortex_core.bench import latency_report
from vortex_core.bench.latency_report import LatencyReport, judge
from vortex_core.bench.workload import Workload
from vortex_core.latency import summarize

WORK = Workload(64, 64, steps=2, iterations=16, warmup=1, cold=2)
PHASES = ["prompt", "prepare", "step 1", "step 2", "decode", "copy out"]
DELAY = 2.0  # seconds; twenty pictures' worth, so that a busy machine cannot hide it


def delayed(call: Callable[..., Any], calls: set[int]) -> Callable[..., Any]:
    """`call`, which sleeps first when it is called for the n-th time, n in `calls`."""
    numbers = count()

    def wrapper(*arguments: Any, **options: Any) -> Any:
        if next(numbers) in calls:
            time.sleep(DELAY)
        return call(*arguments, **options)

    return wrapper


@pytest.fixture(scope="module")
def report(engine: Engine) -> LatencyReport:
    return latency_report.run(engine, WORK, targets={50.0: 1000.0})


def test_cached_and_cold_prompts_are_apart(report: LatencyReport) -> None:
    cached, cold = report.series["cached"], report.series["cold"]
    assert (cached.whole.count, cold.whole.count) == (16, 2)
    assert list(cached.phases) == list(cold.phases) == PHASES
    # encoding takes tens of milliseconds, looking up a fraction of one
    assert cold.phases["prompt"].minimum > cached.phases["prompt"].percentile(50).seconds
    assert len({sample.prompt for sample in report.samples}) == len(WORK.prompts) + WORK.cold
    assert len({sample.seed for sample in report.samples}) == len(report.samples)


def test_phases_add_up_and_measuring_costs_less_than_a_hundredth(report: LatencyReport) -> None:
    assert statistics.median(sample.unmarked / sample.seconds for sample in report.samples) < 0.01
    assert all(sample.unmarked >= 0 for sample in report.samples)
    assert 0 < report.overhead_share < 0.01


def test_clocks_that_disagree_are_counted(report: LatencyReport) -> None:
    sample = report.samples[0]
    off = [replace(sample, seconds=s, unmarked=u) for s, u in ((1.0, 0.02), (1.0, 0.009), (0.01, 0.0009), (1.0, -0.02))]
    assert replace(report, samples=tuple(off)).disagreements == 2


def test_figures_are_json_with_a_schema(report: LatencyReport) -> None:
    import json

    figures = json.loads(json.dumps(report.figures()))
    assert figures["schema"] == "vortex.bench.latency/1"
    assert figures["machine"]["fingerprint"] == report.machine.fingerprint
    assert [verdict["state"] for verdict in figures["verdicts"]] == ["pass"]


@pytest.mark.parametrize("phase", ["step 2", "decode"])
def test_an_injected_stall_is_an_outlier_of_its_phase(
    engine: Engine, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalled = 9
    picture = WORK.warmup + stalled
    if phase == "decode":
        monkeypatch.setattr(
            painter_of(engine).model.decoder, "forward", delayed(painter_of(engine).model.decoder.forward, {picture})
        )
    else:
        monkeypatch.setattr(
            painter_of(engine).model.transformer,
            "forward",
            delayed(painter_of(engine).model.transformer.forward, {2 * picture + 1}),
        )
    report = latency_report.run(engine, WORK)
    found = next(outlier for outlier in report.outliers if outlier.index == stalled)
    assert found.phase == phase
    assert found.excess > DELAY * 0.8
    assert found.reading.load >= 0
    assert report.series["cached"].phases[phase].maximum >= DELAY
    assert report.series["cached"].whole.percentile(99).seconds >= DELAY
    assert report.series["cached"].whole.percentile(50).seconds < DELAY


def test_a_stall_in_every_picture_moves_every_percentile(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "noise", delayed(sampling.noise, set(range(100))))
    series = latency_report.run(engine, Workload(64, 64, steps=1, iterations=3, warmup=0, cold=0)).series["cached"]
    assert series.phases["prepare"].minimum >= DELAY
    assert series.whole.percentile(50).seconds >= DELAY


def test_an_interrupt_keeps_what_was_measured(engine: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    report = latency_report.run(engine, WORK, on_picture=interrupt)
    assert report.interrupted
    assert [sample.index for sample in report.samples] == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        latency_report.run(engine, Workload(64, 64, warmup=9), on_picture=interrupt)


@pytest.mark.parametrize(
    ("samples", "q", "target", "state"),
    [
        ([0.1] * 60, 95, 0.2, "pass"),
        ([0.1] * 50 + [0.3] * 10, 95, 0.2, "fail"),
        ([0.1] * 50, 99, 0.2, "undecided"),
        ([0.3] * 50, 99, 0.2, "fail"),  # P99 is no less than P50
        ([0.1] * 49 + [0.3], 99, 0.2, "undecided"),
        ([0.1] * 299, 99, 0.1, "pass"),
    ],
)
def test_targets(samples: list[float], q: float, target: float, state: str) -> None:
    assert judge(summarize(samples), q, target).state == state


@pytest.mark.parametrize(
    "fields", [{"iterations": 0}, {"warmup": -1}, {"cold": -1}, {"prompts": ()}, {"prompts": ("x",) * 17}]
)
def test_workloads_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(VortexInputError):
        Workload(64, 64, **fields)


@pytest.mark.gpu
def test_on_a_gpu_launched_work_is_an_outlier_of_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(128, 128, iterations=20, warmup=3, cold=3)
    with load_flux_schnell("tiny", device="cuda") as engine:
        clean = latency_report.run(engine, work)
        assert clean.overhead_share < 0.01
        assert clean.disagreements <= 1
        assert all(sample.reading.clock for sample in clean.samples)

        forward, pictures = painter_of(engine).model.decoder.forward, count()

        def launching(*arguments: Any, **options: Any) -> Any:
            if next(pictures) == work.warmup + 10:
                torch.cuda._sleep(2_000_000_000)  # about a second, and returns at once
            return forward(*arguments, **options)

        monkeypatch.setattr(painter_of(engine).model.decoder, "forward", launching)
        report = latency_report.run(engine, work)
    found = next(outlier for outlier in report.outliers if outlier.index == 10)
    assert found.phase == "decode"
    assert found.excess > 0.5
    assert found.excess == pytest.approx(found.seconds - clean.series["cached"].whole.percentile(50).seconds, rel=0.1)
