"""The VRAM profile: its verdicts on a card that is made up, its stages on the CPU, all of it on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from vortex_core import load_flux_schnell
from vortex_core.bench import vram_report
from vortex_core.bench.readings import ALLOCATED, HOST, PROCESS, RESERVED
from vortex_core.bench.verdict import exit_code
from vortex_core.bench.vram_report import Stage, VramReport
from vortex_core.errors import GB

CPU = torch.device("cpu")
NAMES = ["baseline", "loaded", "peak", "after clean-up"]


@pytest.fixture(scope="module")
def report() -> VramReport:
    load = partial(load_flux_schnell, "tiny", device="cpu")
    return vram_report.run(load, CPU, size=(64, 64), steps=1)


def test_without_a_gpu_the_host_is_shown_and_nothing_is_judged(report: VramReport) -> None:
    assert [stage.name for stage in report.stages] == NAMES
    baseline, loaded, peak, _ = (stage.counters[HOST] for stage in report.stages)
    assert baseline < loaded <= peak
    assert {verdict.state for verdict in report.verdicts} == {"undecided"}
    assert exit_code(report.verdicts) == 3
    moments = [moment.seconds for moment in report.timeline]
    assert moments == sorted(moments)
    assert moments[-1] >= report.stages[-1].began > report.stages[0].began


@pytest.mark.parametrize(
    ("reserved", "failing"),
    [
        ((0.1, 5.4, 5.8, 0.1), []),
        ((0.1, 6.7, 6.9, 0.1), ["model"]),
        ((0.1, 5.4, 6.0, 0.1), ["generation adds"]),
        ((0.1, 6.6, 7.05, 0.1), ["peak in all"]),
        ((0.1, 5.4, 5.8, 0.25), ["after clean-up, over the baseline"]),
        ((0.0, 7.0, 8.0, 1.0), ["model", "generation adds", "peak in all", "after clean-up, over the baseline"]),
    ],
)
def test_every_stage_has_its_verdict(report: VramReport, reserved: tuple[float, ...], failing: list[str]) -> None:
    stages = tuple(Stage(name, 0.0, {RESERVED: int(value * GB)}) for name, value in zip(NAMES, reserved, strict=True))
    verdicts = replace(report, stages=stages).verdicts
    assert [v.what.partition(" at most")[0] for v in verdicts if v.state == "fail"] == failing
    assert exit_code(verdicts) == (1 if failing else 0)
    larger = replace(report, stages=stages, size=(512, 528)).verdicts
    assert [v.what.partition(" at most")[0] for v in larger if v.state == "fail"] == [
        what for what in failing if what != "generation adds"
    ]


@pytest.mark.gpu
def test_on_a_gpu_every_counter_is_read_and_the_end_is_the_beginning() -> None:
    load = partial(load_flux_schnell, "tiny", device="cuda")
    report = vram_report.run(load, torch.device("cuda", 0), size=(128, 128), steps=2)
    assert {verdict.state for verdict in report.verdicts} == {"pass"}
    baseline, loaded, peak, after = (stage.counters for stage in report.stages)
    for name in (ALLOCATED, RESERVED):
        assert baseline[name] < loaded[name] < peak[name]
        assert after[name] < peak[name]  # cuBLAS keeps its workspace, which is more than the miniature
    assert PROCESS in peak
