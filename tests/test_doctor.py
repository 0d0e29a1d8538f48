"""The doctor's findings on machines that are not this one."""

from types import SimpleNamespace

import pytest
import torch

from vortex_core.cli import doctor
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
    def missing(module: str) -> str:
        return "does not import (libcudart.so: cannot open shared object file)"

    def broken(model: str) -> None:
        raise VortexCheckpointError("it is damaged")

    monkeypatch.setattr(doctor, "bitsandbytes_declined", lambda device: "no kernel")
    monkeypatch.setattr(doctor, "open_bundle", broken)
    monkeypatch.setattr(doctor, "missing", missing)
    found = findings()
    states = {name: found[name].state for name in ("NF4", "diffusers", "matplotlib", "transformers", "bundled model")}
    assert states == {
        "NF4": "note", "diffusers": "note", "matplotlib": "note", "transformers": "fault", "bundled model": "fault"
    }  # fmt: skip
    assert "only plots need it" in found["matplotlib"].detail


def test_a_package_without_metadata_is_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(package: str) -> str:
        raise doctor.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "version", unknown)
    assert findings()["transformers"] == doctor.Finding("transformers", "ok", "of unknown version")


def test_a_card_that_does_not_answer_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (8, 6), 12e9, 12e9)

    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    found = findings()["GPU 0"]
    assert (found.state, found.detail) == ("fault", "it does not answer: CUDA error: unknown error")


def test_an_accelerator_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert findings()["GPU"].detail == "an Apple GPU (mps), which Vortex does not use"


def test_a_card_without_room_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "bitsandbytes_declined", full)
    assert findings()["NF4"].detail == "no room to try it"
