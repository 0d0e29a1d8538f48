"""Packages that are missing or broken, and NVML of every kind: the work goes on, and says what is not there."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vortex_core import Engine
from vortex_core.bench.machine import gauge, machine
from vortex_core.bench.readings import HOST, counters
from vortex_core.cli.main import app
from vortex_core.device import nvml, vram
from vortex_core.errors import VortexError
from vortex_core.utils import packages, temporary_files
from vortex_core.utils.packages import missing, need, remedy

CUDA = torch.device("cuda", 0)
KINDS = (
    "raise ModuleNotFoundError(\"No module named 'broken_package'\", name='broken_package')",
    "raise OSError('libcudart.so.11.0: cannot open shared object file\\nmore')",
    "raise RuntimeError('CUDA Setup failed')",
    "raise AttributeError('_ARRAY_API not found')",
    "raise SystemExit(3)",
    "raise ValueError('x' * 5000)",
    "import warnings; warnings.warn('old', FutureWarning)",  # an error here, as with `python -W error`
    "def (",
)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_broken", {})


@pytest.mark.parametrize("body", KINDS)
def test_a_package_that_breaks_counts_as_missing_and_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "broken_package.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    why = missing("broken_package")
    assert why is not None
    assert why.startswith("does not import (")
    assert "\n" not in why
    assert len(why) < 250
    (tmp_path / "broken_package.py").write_text("")
    assert missing("broken_package") == why
    with pytest.raises(VortexError, match=r"Drawing needs the package broken_package, which does not import"):
        need("broken_package", "Drawing")


def test_what_imports_is_not_missing() -> None:
    assert missing("json.decoder") is None
    need("json", "Nothing")
    assert "No module named" in (missing("there_is_no_such_package") or "")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("gguf", "pip install 'vortex-flux[gguf]'"),
        ("matplotlib.figure", "pip install 'vortex-flux[plots]'"),
        ("scipy.stats", "pip install 'vortex-flux[stats]'"),
        ("psutil", "pip install psutil"),
        ("PIL.PngImagePlugin", "pip install pillow"),
        ("pynvml", "pip install nvidia-ml-py"),
    ],
)
def test_what_is_missing_names_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, command: str
) -> None:
    top = module.partition(".")[0]
    for name in {top, module}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VortexError, match=r"This needs the package .*, which does not import \(") as raised:
        need(module, "This")
    assert str(raised.value).endswith(f"Try `{command}`.")
    monkeypatch.setattr(packages.metadata, "version", lambda name: 1 / 0)  # as in ComfyUI: the package is not installed
    assert remedy(module) == f"pip install {packages.PACKAGES.get(top, top)}"


def test_what_is_there_but_broken_is_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('no')")
    monkeypatch.syspath_prepend(tmp_path)
    assert remedy("broken_package") == "pip install --upgrade broken_package"


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["leak"], "scipy", "stats"),
        (["baseline", "compare"], "scipy", "stats"),
        (["latency", "-o", "out"], "matplotlib", "plots"),
        (["vram", "-o", "out"], "matplotlib", "plots"),
    ],
)
def test_a_benchmark_says_what_it_lacks_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], package: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "load", lambda *a, **o: pytest.fail("loaded"))
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code in (1, 2)
    assert f"pip install 'vortex-flux[{extra}]'" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_without_psutil_no_temporary_file_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f".vortex-{temporary_files.HOST}-999999999-00000000.part"
    left.touch()
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert not temporary_files.is_abandoned(left)
    temporary_files.sweep(tmp_path)
    assert left.exists()
    monkeypatch.undo()
    packages._broken.clear()
    temporary_files.sweep(tmp_path)
    assert not left.exists()


class Foreign(types.ModuleType):
    """A module named pynvml that is something else."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: object()


def no_call(*arguments: Any) -> None:
    raise TypeError("bytes or integer address expected instead of str instance")


def old(**answers: Any) -> types.SimpleNamespace:
    calls = {"nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid}
    return types.SimpleNamespace(**{**calls, **answers})


def process(pid: int, used: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(pid=pid, usedGpuMemory=used)


@pytest.mark.parametrize(
    "module",
    [
        None,
        types.ModuleType("pynvml"),
        Foreign("pynvml"),
        old(nvmlInit=no_call),
        old(nvmlDeviceGetHandleByUUID=no_call),  # pynvml 8 to 11.4
        old(nvmlDeviceGetComputeRunningProcesses=no_call),
        old(nvmlDeviceGetComputeRunningProcesses=lambda card: [object()]),
        old(nvmlDeviceGetComputeRunningProcesses=lambda card: [process(1, "much")]),
    ],
)
def test_whatever_is_named_pynvml_the_answer_is_unknown(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="x"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert vram.holders(CUDA) == []
    assert vram.process_memory(CUDA) is None
    assert gauge(CUDA)().words[0] == "unknown"
    if not isinstance(module, Foreign):
        assert machine(CUDA).driver is None


def test_a_torch_that_knows_no_uuid_leaves_it_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", old())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace())
    assert vram.holders(CUDA) == []


def test_an_answer_outlives_a_shutdown_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [process(1, 5), process(2, 2**64 - 1), process(3, None)]  # the largest number: it is not told
    module = old(nvmlShutdown=no_call, nvmlDeviceGetComputeRunningProcesses=lambda card: used)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="x"))
    assert [holder.nbytes for holder in vram.holders(CUDA)] == [5, None, None]
    module.nvmlSystemGetDriverVersion = lambda: b"470.10"  # as old modules have it
    assert nvml.ask(lambda library: library.nvmlSystemGetDriverVersion()) == b"470.10"


def test_the_host_may_tell_neither_memory_nor_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.delattr("os.getloadavg")
    assert counters(torch.device("cpu")) == {HOST: None}
    reading = gauge(torch.device("cpu"))()
    assert (reading.load, reading.words[3]) == (None, "unknown")


def test_nothing_asks_nvml_but_its_own_module() -> None:
    root = Path(packages.__file__).parents[1]
    bare = [path.relative_to(root).as_posix() for path in root.rglob("*.py") if "import pynvml" in path.read_text()]
    assert bare == ["device/nvml.py"]
