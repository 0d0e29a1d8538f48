"""What a run remembers of the machine, on a card that is made up."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vortex_core.bench.machine import gauge, machine

CARD = torch.device("cuda", 0)


class NVMLError(Exception):
    """As pynvml's."""


def unsupported(*arguments: Any) -> None:
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card at 1755 MHz and 64 °C, whose driver does not tell its power, held down by heat."""
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksEventReasonNone=0,
        nvmlClocksEventReasonAll=0xFF,
        nvmlClocksEventReasonGpuIdle=1,
        nvmlClocksEventReasonSwPowerCap=4,
        nvmlClocksEventReasonHwThermalSlowdown=64,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.95",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, which: {1: 1755, 2: 2619}[which],
        nvmlDeviceGetTemperature=lambda handle, sensor: 64,
        nvmlDeviceGetPowerUsage=unsupported,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 65,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    return fake


def test_a_reading_tells_what_the_card_tells(nvml: SimpleNamespace) -> None:
    reading = gauge(CARD)()
    assert (reading.clock, reading.memory_clock, reading.temperature, reading.power) == (1755, 2619, 64, None)
    assert reading.throttled == ("HwThermalSlowdown",)
    assert reading.words[:3] == ("1755 MHz", "64 °C", "HwThermalSlowdown")
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 1  # idle is no reason
    assert gauge(CARD)().words[2] == "nothing"


def test_without_nvml_a_reading_says_so(nvml: SimpleNamespace) -> None:
    nvml.nvmlInit = unsupported
    assert gauge(CARD)().words[:3] == ("unknown",) * 3
    assert machine(CARD).driver is None
    assert gauge(torch.device("cpu"))().clock is None


def test_the_fingerprint_is_the_machines_not_vortexs(nvml: SimpleNamespace) -> None:
    card = machine(CARD)
    assert (card.device, card.driver, card.allocator) == ("a card", "580.95", "native")
    assert replace(card, vortex="9.9.9").fingerprint == card.fingerprint
    assert replace(card, driver="581.00").fingerprint != card.fingerprint
    assert replace(card, allocator="cudaMallocAsync").fingerprint != card.fingerprint
    assert machine(torch.device("cpu")).fingerprint != card.fingerprint
    assert machine(torch.device("cpu")).device.startswith("CPU ")
    assert machine(torch.device("cpu")).allocator is None


def test_a_question_that_one_driver_does_not_know_costs_its_answer_alone(nvml: SimpleNamespace) -> None:
    del nvml.nvmlDeviceGetCurrentClocksEventReasons  # as older modules
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: None
    reading = gauge(CARD)()
    assert (reading.clock, reading.temperature, reading.throttled) == (1755, None, None)
    nvml.nvmlSystemGetDriverVersion = lambda: b"470.10"
    assert machine(CARD).driver == "470.10"
