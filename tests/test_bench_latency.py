"""Timed pictures of the miniature: injected delays show up where they were injected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from clock import Clock, told_time
from engine_parts import forget_prompts, painter_of

from vortex_core import Engine, VortexInputError, load_flux_schnell
from vortex_core.bench import latency_report
from vortex_core.bench.latency_report import LatencyReport, judge
from vortex_core.bench.workload import Workload
from vortex_core.flux1 import sampling
from vortex_core.flux1.text_encoders import T5
from vortex_core.flux1.transformer import Transformer
from vortex_core.flux1.vae import Decoder
from vortex_core.utils.timing import summarize

WORK = Workload(64, 64, steps=2, iterations=16, warmup=1, cold=2)
PHASES = ["prompt", "prepare", "step 1", "step 2", "decode", "copy out"]
TAKES = {"prompt": 0.04, "prepare": 0.001, "step 1": 0.01, "step 2": 0.01, "decode": 0.02, "copy out": 0.0}
STALL = 2.0


@contextmanager
def costs(**stalls: dict[int, float]) -> Iterator[Clock]:
    """Encoding, noise, a step and decoding take what `TAKES` says, and `stalls`, by call, on top."""
    with told_time() as (clock, patch):
        for owner, name, phase in (
            (T5, "__call__", "prompt"),
            (sampling, "noise", "prepare"),
            (Transformer, "forward", "step 1"),
            (Decoder, "forward", "decode"),
        ):
            more = stalls.get(phase.split()[0])
            patch.setattr(owner, name, clock.taking(TAKES[phase], getattr(owner, name), more))
        yield clock


@pytest.fixture(scope="module")
def report(engine: Engine) -> LatencyReport:
    forget_prompts(engine)
    with costs():
        return latency_report.run(engine, WORK, targets={50.0: 1000.0})


def test_cached_and_cold_prompts_are_apart(report: LatencyReport) -> None:
    cached, cold = report.series["cached"], report.series["cold"]
    assert (cached.whole.count, cold.whole.count) == (16, 2)
    assert list(cached.phases) == list(cold.phases) == PHASES
    for name, seconds in TAKES.items():
        encoded = name == "prompt"
        assert cached.phases[name].maximum == pytest.approx(0 if encoded else seconds, abs=1e-9)
        assert cold.phases[name].minimum == pytest.approx(seconds, abs=1e-9)
    assert len({sample.prompt for sample in report.samples}) == len(WORK.prompts) + WORK.cold
    assert len({sample.seed for sample in report.samples}) == len(report.samples)


def test_phases_add_up(report: LatencyReport) -> None:
    assert [sample.unmarked for sample in report.samples] == pytest.approx([0.0] * 18, abs=1e-9)
    assert report.overhead == report.disagreements == 0


def test_measuring_reads_the_clock_once_a_phase_and_at_both_ends(engine: Engine) -> None:
    with told_time(tick=0.001) as (clock, _):
        readings: list[int] = []
        work = Workload(64, 64, steps=2, iterations=2, warmup=0, cold=0)
        report = latency_report.run(engine, work, on_picture=lambda *_: readings.append(clock.readings))
    assert readings[1] - readings[0] == len(PHASES) + 4  # when it started, twice at the start, and at the end
    # an empty picture of as many phases, in such readings
    assert report.overhead == pytest.approx((len(PHASES) + 4) * 0.001)


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
def test_an_injected_stall_is_an_outlier_of_its_phase(engine: Engine, phase: str) -> None:
    stalled = 9
    picture = WORK.warmup + stalled
    stalls = {"decode": {picture: STALL}} if phase == "decode" else {"step": {2 * picture + 1: STALL}}
    with costs(**stalls):
        report = latency_report.run(engine, WORK)
    found = next(outlier for outlier in report.outliers if outlier.index == stalled)
    assert found.phase == phase
    assert found.excess == pytest.approx(STALL)
    assert found.reading.load >= 0
    whole = report.series["cached"].whole
    assert report.series["cached"].phases[phase].maximum == pytest.approx(STALL + TAKES[phase])
    assert whole.percentile(99).seconds - whole.percentile(50).seconds == pytest.approx(STALL)


def test_a_stall_in_every_picture_moves_every_percentile(engine: Engine) -> None:
    work = Workload(64, 64, steps=1, iterations=3, warmup=0, cold=0)
    with costs(prepare=dict.fromkeys(range(3), STALL)):
        series = latency_report.run(engine, work).series["cached"]
    assert series.phases["prepare"].minimum == pytest.approx(STALL + TAKES["prepare"])
    assert series.whole.percentile(50).seconds > STALL


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
    assert found.excess > found.seconds / 2
