"""Shared fixtures, and what keeps the tests honest: no network, and a loud reason for whatever does not run.

pytest-socket refuses every connection (pyproject.toml, addopts).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy_host
import pytest

if TYPE_CHECKING:
    import torch
    from cache_parts import Source
    from fake_host import FakeHost

    from vortex_core import Engine
    from vortex_core.device.worker import Worker
    from vortex_core.flux1.transformer import Transformer

pytest.register_assert_rewrite("kernel_parts", "worker_parts")

# Read once by huggingface_hub and transformers, when they are imported: set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

with contextlib.suppress(ImportError):  # a GPU machine may lack it, and runs no test that needs it
    from hypothesis import settings

    settings.register_profile("quick", max_examples=100, deadline=None, database=None)
    settings.register_profile("nightly", max_examples=10_000, deadline=None, database=None)
    settings.load_profile("quick")


def pytest_configure() -> None:
    """Say what torch and Triton read when a test module imports them."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # each of the processes that share the tests has one core
        os.environ["OMP_NUM_THREADS"] = "1"
    if not _cuda_is_available():  # there Triton's kernels run in its interpreter, and else compiled
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    comfyui = [item for item in items if item.get_closest_marker("comfyui")]
    if gpu and not _cuda_is_available():
        _skip(gpu, "NOT RUN, full size on a GPU: torch sees no CUDA device here")
    if comfyui and not comfy_host.trees():
        _skip(comfyui, "NOT RUN, inside ComfyUI: no tree in $COMFYUI_PATH, nor at ~/comfy/ComfyUI")


def _skip(items: list[pytest.Item], reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _outside_inference_mode() -> Iterator[None]:
    """A test that leaves its thread in inference mode fails, and not one after it."""
    import torch

    from vortex_core.utils.inference_mode import inference_mode

    with inference_mode(False):
        yield
        left = torch.is_inference_mode_enabled()
    assert not left, "this test has left its thread in torch's inference mode"


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """The bundled miniature, a diffusers directory."""
    import vortex_core

    return Path(vortex_core.__file__).parent / "assets" / "tiny-schnell"


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The miniature on the CPU in NF4, shared by all tests: leave it as you found it."""
    import vortex_core

    return vortex_core.load_flux_schnell(model="tiny", device="cpu", quantization="nf4")


@pytest.fixture(scope="module")
def _host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    from fake_host import FakeHost, module

    fake = FakeHost(tmp_path_factory.mktemp("host"))
    engines, native_patcher = module("nodes.engines"), module("nodes.native_patcher")
    with pytest.MonkeyPatch.context() as patch:
        for name, content in fake.modules().items():
            patch.setitem(sys.modules, name, content)
        native_patcher.patcher_class.cache_clear()
        yield fake
        engines._loaded.clear()
        native_patcher.patcher_class.cache_clear()


@pytest.fixture
def comfy(_host: FakeHost) -> FakeHost:
    """The stand-in for ComfyUI, as it starts."""
    _host.reset()
    return _host


@pytest.fixture
def model(comfy: FakeHost) -> Any:
    """The loader's handle of the miniature."""
    from fake_host import node

    handle, *_ = node("VortexFluxLoader").load("tiny-schnell", 6.5, "exact")
    return handle


# Of several files each. What they need is imported when one is used: torch after `pytest_configure`, that is.


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, Worker]:
    """Engines of other tests may be alive, and keep their workers."""
    from vortex_core.device import worker as module

    workers: dict[torch.device, Worker] = {}
    monkeypatch.setattr(module, "_workers", workers)
    return workers


@pytest.fixture
def worker(registry: dict[torch.device, Worker]) -> Iterator[Worker]:
    """Its thread is the only one at the end, and ends."""
    from worker_parts import CPU, Thing, until

    from vortex_core.device.worker import worker_of

    before = set(threading.enumerate())
    worker = worker_of(CPU)
    detach = worker.attach(Thing())
    del detach
    engine = Thing()
    detach = worker.attach(engine)
    assert worker.run(lambda: 1) == 1
    yield worker
    assert worker.run(lambda: 2) == 2
    assert len(set(threading.enumerate()) - before) == 1
    assert worker._stack == worker._queue == []
    detach()
    until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def alone(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine on a worker of its own, which a test may break."""
    import vortex_core
    from vortex_core.device import worker

    monkeypatch.setattr(worker, "_workers", {})
    with vortex_core.load_flux_schnell(tiny_dir, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def loaded(tiny_dir: Path) -> Iterator[Engine]:
    from memory_parts import AMPLE

    import vortex_core

    with vortex_core.load_flux_schnell(tiny_dir, device="cpu", vram_budget=AMPLE) as engine:
        yield engine


@pytest.fixture
def roomy(loaded: Engine) -> Iterator[Engine]:
    """An engine with an ample budget and nothing of earlier tests, to be narrowed by a test."""
    from engine_parts import forget_prompts, painter_of
    from memory_parts import AMPLE, GB

    painter_of(loaded).memory.offload()
    yield loaded
    forget_prompts(loaded)
    painter_of(loaded).memory.budget = AMPLE * GB


@pytest.fixture
def transformer(engine: Engine) -> Iterator[Transformer]:
    from engine_parts import painter_of

    from vortex_core.kernels import reference

    shared = painter_of(engine).model.transformer
    yield shared
    shared.use(reference)


@pytest.fixture
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=[pytest.param("compiled", marks=pytest.mark.gpu), "interpreted"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """The module of Triton's kernels."""
    if request.param == "interpreted" and _cuda_is_available():
        pytest.skip("interpreted: here they run compiled")
    pytest.importorskip("triton", reason="NOT RUN, the Triton kernels: Triton is not installed here")
    import cuda_on_cpu

    from vortex_core.kernels import fused

    cuda_on_cpu.use(monkeypatch)  # for what is in CUDA C everywhere
    return fused


@pytest.fixture(params=[True, False], ids=["copied", "loaded"])
def copies(fused, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tiles come by the bulk copy engine, or, as on cards that have none, by loads."""
    from kernel_parts import DEVICE

    from vortex_core.kernels.card import card

    known = card(DEVICE)
    if request.param and not known.copies:
        pytest.skip("NOT RUN, the copy engine: this card has none")
    for name in ("convolution", "decoder_attention", "fp8_attention", "int8_product"):
        module = sys.modules[f"vortex_core.kernels.{name}"]
        monkeypatch.setattr(module, "card", lambda device: known._replace(copies=request.param))
    return bool(request.param)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    import torch
    from cache_parts import Source

    from vortex_core.checkpoint import cache

    monkeypatch.setattr(cache, "SMALLEST", 0)
    torch.manual_seed(0)
    return Source(tmp_path)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of models' files are read, each time."""
    from vortex_core.storage.filebytes import FileBytes

    counts: list[int] = []
    real = FileBytes.read
    monkeypatch.setattr(
        FileBytes, "read", lambda file, offset, memory: counts.append(len(memory)) or real(file, offset, memory)
    )
    return counts


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that were quantized."""
    from vortex_core import nf4

    done: list[str] = []
    real = nf4.quantize
    monkeypatch.setattr(nf4, "quantize", lambda weight, name: done.append(name) or real(weight, name))
    return done
