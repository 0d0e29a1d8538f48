"""The nodes that only observe, where what they observe with is missing, broken or of another kind."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_host import FakeHost, module, node

errors, host, monitoring, packages, plot = (
    module(name)
    for name in ("vortex_core.errors", "nodes.host", "nodes.vram_monitor", "vortex_core.utils.packages", "nodes.plot")
)
recording, figures_module, engines = (
    module(name) for name in ("nodes.recorder", "vortex_core.bench.plot_style", "nodes.engines")
)
KINDS = ("mps", "xpu", "privateuseone:0", "hpu", "xla")


def monitor() -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    value, text, figures, timeline = node("VortexVRAMMonitor").monitor("drawn", 1.0, 2.0, True)
    return value, text, json.loads(figures), timeline


@pytest.fixture(params=["missing", "broken", "fails to draw"])
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matplotlib that is not there, or does not work."""
    monkeypatch.setattr(packages, "_broken", {})
    if request.param == "missing":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif request.param == "broken":
        monkeypatch.setattr(packages, "import_module", lambda name: 1 / 0)
        monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    else:
        monkeypatch.setattr(figures_module, "_sheet", lambda *labels: 1 / 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_monitor_names_what_the_host_computes_on(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(host, "device", lambda: torch.device(kind))
    value, text, figures, _ = monitor()
    assert (value, figures["status"]) == ("drawn", "no gpu")
    assert kind.partition(":")[0] in text
    assert "CPU" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_vortex_does_not_run_on_is_one_sentence(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(host, "device", lambda: torch.device(kind))
    engines._loaded.clear()
    with pytest.raises(errors.VortexDeviceError, match=rf"not on .*{kind.partition(':')[0]}.*--cpu"):
        node("VortexFluxLoader").load("tiny-schnell", 6.5, "fast")


def test_a_plot_that_cannot_be_made_is_one_line_of_the_monitors_report(comfy: FakeHost, no_plots: None) -> None:
    value, text, _, timeline = monitor()
    assert value == "drawn"
    assert text.splitlines()[1].startswith("No plot: matplotlib does not")
    assert timeline.shape == (1, plot.HEIGHT, plot.WIDTH, 3)


def test_a_plot_that_cannot_be_made_is_one_line_of_the_probes_report(
    comfy: FakeHost, model: Any, no_plots: None
) -> None:
    text, figures, histogram, passed = node("VortexLatencyProbe").probe(model, "a red circle", 64, 64, 1, 3, 0, "drawn")
    assert (passed, json.loads(figures)["count"]) == ("drawn", 3)
    assert text.splitlines()[-1].startswith("No plot: matplotlib does not")
    assert histogram.shape == (1, plot.HEIGHT, plot.WIDTH, 3)


@pytest.mark.parametrize("call", ["mem_get_info", "max_memory_reserved", "get_device_name"])
def test_a_card_that_does_not_tell_costs_the_figures_alone(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Neither the monitor nor the thread that samples for it ends the run."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    monkeypatch.setattr(host, "device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2))
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fail)
    monkeypatch.setattr(torch.cuda, call, fail)
    monkeypatch.setattr(monitoring, "recorder", recording.Recorder())
    node("VortexVRAMMonitor").IS_CHANGED(reset_peak=True)
    value, text, figures, _ = monitor()
    if monitoring.recorder.timeline is not None:
        monitoring.recorder.timeline.join(10)
    assert (value, figures["status"]) == ("drawn", "unknown")
    assert "getDeviceStats" in text
