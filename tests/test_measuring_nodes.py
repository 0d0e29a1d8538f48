"""VRAM Monitor and Latency Probe on a stand-in for ComfyUI, their figures and plots."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_host import PACK, FakeHost, Interrupted, module, node

PROMPT = "a red circle on a white background"
SIDE = 64

host, types = module("nodes.host"), module("nodes.types")
plot, recording, monitoring = module("nodes.plot"), module("nodes.recorder"), module("nodes.vram_monitor")
plot_style = module("vortex_core.bench.plot_style")
errors, latency = module("vortex_core.errors"), module("vortex_core.utils.timing")


# ---------------------------------------------------------------- VRAM Monitor


def test_the_monitor_passes_on_and_says_that_there_is_no_gpu(comfy: FakeHost) -> None:
    value = object()
    passed, text, figures, timeline = node("VortexVRAMMonitor").monitor(value, 1.0, 2.0, True)
    assert passed is value
    assert "No NVIDIA GPU" in text
    assert json.loads(figures)["status"] == "no gpu"
    assert timeline.shape == (1, plot.HEIGHT, plot.WIDTH, 3)


def test_measuring_nodes_run_each_time(comfy: FakeHost) -> None:
    monitor, probe = (PACK.NODE_CLASS_MAPPINGS[key] for key in ("VortexVRAMMonitor", "VortexLatencyProbe"))
    assert monitor.IS_CHANGED(reset_peak=True) != monitor.IS_CHANGED(reset_peak=True)
    assert probe.IS_CHANGED() != probe.IS_CHANGED()


@pytest.mark.parametrize(
    ("soft", "hard", "status"),
    [
        (0, 0, "ok"),
        (5, 0, "ok"),
        (4.9, 0, "over the soft limit"),
        (4, 4.5, "over the hard limit"),
        (4, 5, "over the soft limit"),
    ],
)
def test_limits(soft: float, hard: float, status: str) -> None:
    assert monitoring.judge(5 * 10**9, soft, hard) == status


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA card of 8 GB, 5 GB reserved by torch, whose driver does not tell the process."""
    monkeypatch.setattr(host, "device", lambda: SimpleNamespace(type="cuda"))
    counters = {"memory_allocated": 3, "memory_reserved": 4, "max_memory_allocated": 4, "max_memory_reserved": 5}
    for name, gigabytes in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, n=gigabytes: n * 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(monitoring, "recorder", recording.Recorder())


def test_the_monitor_reports_a_card(comfy: FakeHost, card: None, caplog: pytest.LogCaptureFixture) -> None:
    comfy.running = 3
    PACK.NODE_CLASS_MAPPINGS["VortexVRAMMonitor"].IS_CHANGED(reset_peak=True)
    monitoring.recorder.timeline.join(10)
    assert len(monitoring.recorder.samples) == 3  # the thread ends with the host's run
    _, text, figures, _ = node("VortexVRAMMonitor").monitor("x", 4.5, 0.0, True)
    monitoring.recorder.timeline.join(10)
    assert "torch reserved" in text
    assert "unknown" in text
    found = json.loads(figures)
    assert found["peak"] == {"allocated": 4 * 10**9, "reserved": 5 * 10**9, "process": None, "device": 7 * 10**9}
    assert found["status"] == "over the soft limit"
    assert "over the soft limit" in caplog.text


def test_the_monitor_stops_a_run_that_took_too_much(comfy: FakeHost, card: None) -> None:
    with pytest.raises(errors.VortexError, match=r"(?s)stops the run.*over the hard limit"):
        node("VortexVRAMMonitor").monitor("x", 0.0, 4.5, True)
    monitoring.recorder.timeline.join(10)


def test_the_recorder_forgets_only_when_told(comfy: FakeHost, card: None) -> None:
    recorder = recording.Recorder()
    for reset, expected in ((True, 1), (False, 2), (True, 1)):
        recorder.begin(SimpleNamespace(type="cuda"), reset=reset)
        recorder.timeline.join(10)
        assert len(recorder.samples) == expected


def test_any_equals_every_type_and_stays_a_string() -> None:
    assert not types.ANY.__ne__("IMAGE")  # what the host asks
    assert types.ANY == "*"
    assert json.dumps(types.ANY) == '"*"'


# ---------------------------------------------------------------- Latency Probe


def test_the_probe_measures_and_passes_on(comfy: FakeHost, model: Any) -> None:
    value = object()
    text, figures, histogram, passed = node("VortexLatencyProbe").probe(model, PROMPT, SIDE, SIDE, 1, 5, 1, value)
    found = json.loads(figures)
    assert passed is value
    assert len(found["seconds"]) == found["count"] == 5
    assert "P99.9" in text
    assert "rests on 1 of 5 samples" in text
    assert histogram.shape == (1, plot.HEIGHT, plot.WIDTH, 3)
    assert [done for done, _, _ in comfy.progress[-1]] == [1, 2, 3, 4, 5, 6]


def test_the_probe_can_be_interrupted(comfy: FakeHost, model: Any) -> None:
    comfy.interrupt_after = 3
    with pytest.raises(Interrupted):
        node("VortexLatencyProbe").probe(model, PROMPT, SIDE, SIDE, 1, 50, 0)


def test_percentiles_are_measured_times_and_say_what_they_rest_on() -> None:
    found = latency.summarize([i / 1000 for i in range(1, 1001)])
    assert [(p.q, p.seconds, p.support) for p in found.percentiles] == [
        (50, 0.5, 501), (90, 0.9, 101), (95, 0.95, 51), (99, 0.99, 11), (99.9, 0.999, 2),
    ]  # fmt: skip
    assert found.mean == pytest.approx(0.5005)
    assert found.outliers == ()


def test_outliers_lie_beyond_three_sigma() -> None:
    assert latency.summarize([1.0] * 30 + [9.0]).outliers == ((30, 9.0),)
    single = latency.summarize([2.0])
    assert (single.deviation, single.outliers, single.percentiles[-1].support) == (0.0, (), 1)


@pytest.mark.parametrize("samples", [[], [float("nan")], [-1.0], [float("inf")]])
def test_what_cannot_be_summarized_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no sample|finite"):
        latency.summarize(samples)


# ---------------------------------------------------------------- plots


@pytest.mark.parametrize("samples", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [i**2 for i in range(500)], [1e-9, 1e9]])
def test_any_samples_make_a_histogram(samples: list[float]) -> None:
    image = plot.image(plot_style.histogram("title", samples, [(samples[0], "P50")], "ms"))
    assert image.shape == (1, plot.HEIGHT, plot.WIDTH, 3)
    assert image.min() >= 0
    assert image.max() == 1


@pytest.mark.parametrize("line", [[], [(0.0, 0.0)], [(0.0, 1.0), (1.0, 2.0)], [(i / 20, i % 7) for i in range(5000)]])
def test_any_samples_make_a_timeline(line: list[tuple[float, float]]) -> None:
    image = plot.image(plot_style.timeline("title", {"torch reserved": line}, [(1.5, "soft limit", plot_style.WARN)]))
    assert image.shape == (1, plot.HEIGHT, plot.WIDTH, 3)
