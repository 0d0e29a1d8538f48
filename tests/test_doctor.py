"""The doctor's findings on machines that are not this one."""

from types import SimpleNamespace

import pytest
import torch

from vortex_core import doctor
from vortex_core.errors import VortexCheckpointError


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], total: float, free: float) -> None:
    properties = SimpleNamespace(name="Card", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, total))
    monkeypatch.setattr(doctor, "bitsandbytes_declined", lambda device: None)


@pytest.mark.parametrize(
    ("capability", "total", "free", "state", "says"),
    [
        ((8, 6), 12.9e9, 12e9, "ok", ""),
        ((7, 5), 8e9, 8e9, "fault", "native bf16"),
        ((8, 6), 6e9, 6e9, "note", "fits with weights that stream"),
        ((8, 9), 12e9, 3e9, "note", "Close other programs"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    total: float,
    free: float,
    state: str,
    says: str,
) -> None:
    pretend_gpu(monkeypatch, capability, total, free)
    gpu = findings()["GPU 0"]
    assert gpu.state == state
    assert says in gpu.fix


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert findings()["GPU"].state == "note"


def test_broken_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise doctor.metadata.PackageNotFoundError(package)

    def broken(model: str) -> None:
        raise VortexCheckpointError("it is damaged")

    monkeypatch.setattr(doctor, "bitsandbytes_declined", lambda device: "no kernel")
    monkeypatch.setattr(doctor, "open_bundle", broken)
    monkeypatch.setattr(doctor.metadata, "version", missing)
    found = findings()
    assert found["NF4"].state == "note"
    assert found["diffusers"].state == "note"
    assert found["transformers"].state == "fault"
    assert found["bundled model"].state == "fault"
    monkeypatch.delitem(doctor.sys.modules, "bitsandbytes")
    assert findings()["NF4"].state == "fault"


def test_a_card_without_room_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "bitsandbytes_declined", full)
    assert findings()["NF4"].detail == "no room to try it"
