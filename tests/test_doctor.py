"""The doctor's findings on machines that are not this one."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vortex_core.cli import doctor
from vortex_core.errors import VortexCheckpointError
from vortex_core.kernels import reference
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.quant.precision import EXACT, Int8
from vortex_core.runtime.modes import Choice, Declined
from vortex_core.utils import packages


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], total: float, free: float) -> None:
    properties = SimpleNamespace(name="Card", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, total))
    monkeypatch.setattr(doctor, "bitsandbytes_declined", lambda device: None)
    monkeypatch.setattr(doctor, "compiled_declined", lambda device: None)


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


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Callable[[Choice | Exception], None]:
    """Says what `fast` gets on a card with 12.6 GB that is not there, or what trying it raises."""
    pretend_gpu(monkeypatch, (8, 6), 12.6e9, 12e9)
    monkeypatch.setattr(doctor, "choose_backend", lambda device: ReferenceBackend())
    monkeypatch.setattr(doctor, "choose_kernels", lambda device: reference)

    def say(chosen: Choice | Exception) -> None:
        def choose(*arguments: object) -> Choice:
            assert arguments[:3] == ("fast", torch.device("cuda", 0), torch.bfloat16)
            if isinstance(chosen, Exception):
                raise chosen
            return chosen

        monkeypatch.setattr(doctor, "choose_precision", choose)

    return say


def test_the_precision_of_a_card_and_why(choice: Callable[[Choice | Exception], None]) -> None:
    fp8 = Declined("fp8 needs compute capability 8.9, and this card has 8.6")
    choice(Choice(Int8(), "the only one in 8 bits that runs here", {"fp8": fp8}))
    found = findings()
    precision, budget = found["precision, GPU 0"], found["budget, GPU 0"]
    assert (precision.state, precision.fix) == ("ok", "")
    assert precision.detail == (
        "`fast` means int8 here: the only one in 8 bits that runs here; fp8 declined: fp8 needs compute capability "
        "8.9, and this card has 8.6"
    )
    assert budget.detail == "6.5 GB by default; FLUX.1-schnell then has 4.6 GB in host memory"
    assert "name up to 11.6 GB as `vram_budget`: 4.6 GB less to copy for a new prompt, " in budget.fix
    assert "blocks decoded to 8 bits once" in budget.fix


def test_what_would_make_a_card_faster(choice: Callable[[Choice | Exception], None]) -> None:
    declined = Declined("Triton is not there", "pip install triton")
    choice(Choice(EXACT, "nothing in 8 bits runs here", {"int8": declined, "fp8": declined}))
    found = findings()
    assert found["precision, GPU 0"].state == "note"
    assert found["precision, GPU 0"].fix == "pip install triton"  # once
    assert "8 bits" not in found["budget, GPU 0"].fix  # nothing is decoded to them


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no room to try it"),
        (KeyError("a fault\nof many lines"), "it cannot be tried: 'a fault"),
        (RuntimeError("no kernel image"), "it cannot be tried: no kernel image"),
    ],
)
def test_a_precision_that_cannot_be_tried_is_a_finding(
    choice: Callable[[Choice | Exception], None], error: Exception, detail: str
) -> None:
    choice(error)
    found = findings()["precision, GPU 0"]
    assert found.state == "note"
    assert found.detail.startswith(detail)


def test_a_small_card_is_offered_no_larger_budget(
    choice: Callable[[Choice | Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice(Choice(Int8(), "", {}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (6e9, 6e9))
    found = findings()["budget, GPU 0"]
    assert (found.state, found.fix) == ("ok", "")
    monkeypatch.setattr(doctor, "propose", lambda *arguments: {}["no plan"])
    assert findings()["budget, GPU 0"].detail.startswith("it cannot be planned")


def test_a_card_that_is_too_old_has_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 5), 8e9, 8e9)
    assert not [name for name in findings() if name.startswith(("precision", "budget"))]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = findings()
    assert found["GPU"].state == "note"
    assert found["precision"].state == "ok"
    assert found["precision"].detail == "`fast` means exact here: products in 8 bits gain nothing on cpu"


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


@pytest.mark.parametrize(
    ("torch_version", "installs"),
    [
        ("2.6.0", "triton-windows<3.3"),
        ("2.11.0+cu130", "triton-windows<3.7"),
        ("2.13.1+cu130", "triton-windows<3.8"),
        ("2.99.0", "triton-windows"),  # nobody knows yet
        ("3.6.0", "triton-windows"),
        ("nightly", "triton-windows"),
    ],
)
def test_windows_is_told_the_triton_of_its_torch(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, installs: str
) -> None:
    pretend_gpu(monkeypatch, (8, 6), 12e9, 12e9)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(packages.metadata, "version", lambda package: torch_version)
    found = findings()["triton"]
    assert (found.state, found.fix) == ("note", f'pip install -U "{installs}"')
    assert found.detail.endswith("kernels in CUDA C run instead")


def test_without_triton_the_doctor_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (8, 6), 12e9, 12e9)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", "linux")
    assert findings()["triton"].fix.endswith("triton")
    monkeypatch.setattr(doctor, "bitsandbytes_declined", lambda device: "no kernel")
    assert findings()["NF4"] == doctor.Finding("NF4", "ok", "our own kernel decodes on cuda:0; bitsandbytes: no kernel")
    monkeypatch.setattr(doctor, "compiled_declined", lambda device: "NVRTC does not run (no such file)")
    found = findings()
    assert "kernels in CUDA C: NVRTC does not run (no such file)" in found["triton"].detail
    assert found["NF4"].state == "note"


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"triton": "3.6.0"}, "3.6.0"),
        ({"triton-windows": "3.6.0.post24"}, "triton-windows 3.6.0.post24"),
        ({}, "of unknown version"),
    ],
)
def test_triton_is_recognized_by_either_name(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], says: str
) -> None:
    pretend_gpu(monkeypatch, (8, 6), 12e9, 12e9)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package, doctor.UNKNOWN))
    assert findings()["triton"] == doctor.Finding("triton", "ok", says)
