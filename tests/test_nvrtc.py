"""How CUDA C is compiled and launched, with libraries that are not there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vortex_core.kernels import nvrtc

CARD, HALF = torch.device("cuda", 0), torch.bfloat16


class Nvrtc:
    """NVRTC, which compiles every text but one with `error` to its own bytes."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.text = b""

    def nvrtcCreateProgram(self, program: Any, text: bytes, *names: Any) -> int:
        self.text = text
        return 0

    def nvrtcCompileProgram(self, program: Any, count: int, options: Any) -> int:
        self.told.append(options[0].decode())
        return 6 if b"error" in self.text else 0

    def nvrtcDestroyProgram(self, program: Any) -> int:
        self.told.append("destroyed")
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        found = {"ProgramLog": b"line 1: no\0", "CUBIN": b"code of " + self.text}
        what = name.removeprefix("nvrtcGet").removesuffix("Size")

        def get(program: Any, place: Any) -> int:
            if name.endswith("Size"):
                place._obj.value = len(found[what])
            else:
                place[: len(found[what])] = found[what]
            return 0

        return get


class Driver:
    """The driver, whose launches return `codes` in turn, then 0."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.launched: list[tuple[Any, ...]] = []
        self.loaded: list[bytes] = []
        self.attributes: list[list[tuple[int, int]]] = []

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        self.loaded.append(code)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        function._obj.value = len(name)
        return 500 if name == b"absent" else 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, _: Any) -> int:
        asked = config._obj
        names = ("x", "y", "z", "threads", "threads_y", "threads_z", "shared_memory")
        given = [ctypes.c_longlong.from_address(pointer).value for pointer in pointers]
        sizes = tuple(getattr(asked, name) for name in names)
        self.launched.append((function.value, sizes, asked.stream, given))
        attributes = [asked.attributes[i] for i in range(asked.count)]
        self.attributes.append([(attribute.kind, attribute.value) for attribute in attributes])
        return self.codes.pop(0) if self.codes else 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"it failed"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver, compiler = Driver(), Nvrtc()
    nvrtc._functions.cache_clear()
    monkeypatch.setattr(nvrtc, "load", lambda: compiler)
    monkeypatch.setattr(nvrtc, "driver_library", lambda: driver)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(major=8, minor=6))
    stream = SimpleNamespace(cuda_stream=77, query=lambda: True)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: stream)
    yield driver
    nvrtc._functions.cache_clear()


def test_a_launch_may_be_early_and_take_shared_memory(driver: Driver) -> None:
    for early, shared in ((False, 0), (True, 4096)):
        nvrtc.launch("decode", (1, 1), 32, CARD, HALF, early=early, shared=shared)
    assert [sizes[6] for _, sizes, *_ in driver.launched] == [0, 4096]
    assert driver.attributes == [[], [(6, 1)]]  # 6: programmatic stream serialization, in cuda.h
    assert ctypes.sizeof(nvrtc._Attribute) == 72
    assert ctypes.sizeof(nvrtc._Config) == 56


def test_kernels_are_compiled_once_and_launched_on_the_current_stream(driver: Driver) -> None:
    x = torch.zeros(3)
    for _ in range(2):
        nvrtc.launch("decode", (5, 2), 96, CARD, HALF, x, None, nvrtc.Long(2**40))
    assert len(driver.loaded) == 1
    assert driver.loaded[0].startswith(b"code of #define VALUE 1")
    expected = (len("decode"), (5, 2, 1, 96, 1, 1, 0), 77, [x.data_ptr(), 0, 2**40])
    assert driver.launched == [expected, expected]
    nvrtc.launch("decode", (5, 2), 96, CARD, torch.float16, x)
    assert len(driver.loaded) == 2  # another type is another text


def test_a_thread_without_a_context_gets_one(driver: Driver) -> None:
    driver.codes = [nvrtc.NO_CONTEXT]
    nvrtc.launch("decode", (1, 1), 32, CARD, HALF)
    assert len(driver.launched) == 2


def test_what_the_driver_refuses_is_said(driver: Driver) -> None:
    driver.codes = [700]
    with pytest.raises(nvrtc.CompileError, match=r"CUDA, launching decode: it failed \(700\)"):
        nvrtc.launch("decode", (1, 1), 32, CARD, HALF)
    with pytest.raises(nvrtc.CompileError, match="finding absent"):
        nvrtc.launch("absent", (1, 1), 32, CARD, HALF)


def test_what_nvrtc_refuses_is_said_with_its_log(driver: Driver) -> None:
    compiler = nvrtc.load()
    assert nvrtc.compiled("text", "sm_86") == b"code of text"
    assert compiler.told == ["--gpu-architecture=sm_86", "destroyed"]
    with pytest.raises(nvrtc.CompileError, match=r"NVRTC, compiling for sm_86: line 1: no$"):
        nvrtc.compiled("error", "sm_86")
    assert compiler.told[-1] == "destroyed"


def test_without_a_driver_there_is_a_reason(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "driver_library", lambda: None)
    with pytest.raises(OSError, match="the CUDA driver's library does not load"):
        nvrtc.launch("decode", (1, 1), 32, CARD, HALF)


@pytest.mark.parametrize(("system", "name"), [("nt", "nvrtc64_130_0.dll"), ("posix", "libnvrtc.so.13")])
def test_the_library_is_that_of_torchs_cuda(monkeypatch: pytest.MonkeyPatch, system: str, name: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "os", SimpleNamespace(name=system))
    assert next(nvrtc._names()) == name
