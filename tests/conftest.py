"""Shared fixtures, and what keeps the tests honest: no network, and a loud reason for whatever does not run.

pytest-socket refuses every connection (pyproject.toml, addopts).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy_host
import pytest

if TYPE_CHECKING:
    from fake_host import FakeHost

    from vortex_core import Engine

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
    engines, host = module("nodes.engines"), module("nodes.host")
    with pytest.MonkeyPatch.context() as patch:
        for name, content in fake.modules().items():
            patch.setitem(sys.modules, name, content)
        host._patcher_class.cache_clear()
        yield fake
        engines._loaded.clear()
        host._patcher_class.cache_clear()


@pytest.fixture
def comfy(_host: FakeHost) -> FakeHost:
    """The stand-in for ComfyUI, as it starts."""
    _host.reset()
    return _host


@pytest.fixture
def model(comfy: FakeHost) -> Any:
    """The loader's handle of the miniature."""
    from fake_host import node

    handle, _ = node("VortexFluxLoader").load("tiny-schnell", 6.5, "exact")
    return handle
