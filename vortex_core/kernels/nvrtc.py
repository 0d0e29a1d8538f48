"""CUDA C at run time: compiled by NVRTC, which every CUDA build of torch carries, on Windows too.

So these kernels need neither Triton nor a compiler on the machine. The text is compiled once a process, card and type,
in about a second, to machine code of that very card. It lies in the folder `cuda`; kernels/compiled.py launches it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device.vram import driver_library
from ..nf4 import LEVELS
from .reference import EPSILON, LEAST_NORM

Long = ctypes.c_longlong
Argument = Tensor | ctypes.c_longlong | int | float | None

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # VALUE in cuda/values.cuh
MODULES = {  # what is compiled at once: a picture in 16 bits without LoRAs needs the first alone
    "step": ("values.cuh", "step.cu", "decoder.cu"),
    "eight": ("values.cuh", "eight.cuh", "decode8.cu", "rows8.cu", "product.cu"),
}
# What weights.cu writes, and for whom: without LoRAs, with them, or with more ranks than shared memory holds. Each is a
# module of its own, with these constants in its text.
_WRITTEN = ("values", "fp8", "int8", "fp8_scales", "int8_scales")
VARIANTS = {
    f"{kind}_{what}": {"WHAT": _WRITTEN.index(what), "ADAPTED": int(kind != "plain"), "MANY": int(kind == "many")}
    for kind in ("plain", "adapted", "many")
    for what in _WRITTEN
    if kind != "plain" or what.startswith("int8")
}
MODULES |= dict.fromkeys(VARIANTS, ("values.cuh", "eight.cuh", "weights.cu"))
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of the driver: CUlaunchAttributeID
NO_CONTEXT = 201  # of the driver: this thread has not used the card yet


class CompileError(RuntimeError):
    """NVRTC or the driver refused, with its words."""


def launch(
    name: str,
    grid: tuple[int, int],
    threads: int,
    device: torch.device,
    dtype: torch.dtype,
    *arguments: Argument,
    module: str = "step",
    early: bool = False,
    shared: int = 0,
) -> None:
    """Run a kernel on the current stream of `device`, which is the current one. `dtype`: that of the activations.

    An `int` is a C `int`, a `float` a C `float`, None a null pointer. `early`: see kernels/launch.py; the kernel waits
    by itself for those before it. `shared`: bytes of shared memory beside what its text declares.
    """
    function = _functions(device.index or 0, dtype, module)[name]
    values = [_c(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    stream = torch.cuda.current_stream(device)
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    shape = (*grid, 1, threads, 1, 1, shared)
    config = _Config(*shape, stream.cuda_stream, ctypes.pointer(attribute), int(early))
    code = _driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
    if code == NO_CONTEXT:
        stream.query()
        code = _driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
    _checked(code, f"launching {name}")


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver."""

    _fields_ = (("kind", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared_memory")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def _c(argument: Argument) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int(argument) if isinstance(argument, int) else argument


def source(dtype: torch.dtype, module: str = "step") -> str:
    """The text of a module's kernels for activations in `dtype`."""
    levels = ", ".join(f"{level!r}f" for level in LEVELS)
    numbers = {"EPSILON": f"{EPSILON!r}f", "LEAST_NORM": f"{LEAST_NORM!r}f", "LEVELS": levels}
    constants = {"VALUE": TYPES[dtype], **numbers, **VARIANTS.get(module, {})}
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    folder = Path(__file__).with_name("cuda")
    return "\n".join([*lines, *((folder / name).read_text(encoding="utf-8") for name in MODULES[module])])


@cache
def _functions(index: int, dtype: torch.dtype, module: str) -> _Functions:
    return _Functions(index, dtype, module)


class _Functions:
    """The functions of one module on one card, by name. It stays loaded until the process ends."""

    def __init__(self, index: int, dtype: torch.dtype, module: str) -> None:
        card = torch.cuda.get_device_properties(index)
        code = compiled(source(dtype, module), f"sm_{card.major}{card.minor}")
        self._module, self._found = ctypes.c_void_p(), dict[str, ctypes.c_void_p]()
        torch.cuda.current_stream(index).query()  # the card's context is this thread's from here on
        _checked(_driver().cuModuleLoadData(ctypes.byref(self._module), code), "loading kernels")

    def __getitem__(self, name: str) -> ctypes.c_void_p:
        if name not in self._found:
            found = ctypes.c_void_p()
            code = _driver().cuModuleGetFunction(ctypes.byref(found), self._module, name.encode())
            _checked(code, f"finding {name}")
            self._found[name] = found
        return self._found[name]


def compiled(text: str, arch: str) -> bytes:
    """Machine code of CUDA C for `arch`, such as `sm_86`; for `compute_86`, PTX for it and all later cards.

    Raises `CompileError`, and `OSError` without NVRTC.
    """
    nvrtc, program = load(), ctypes.c_void_p()

    def told(code: int, what: str, log: str = "") -> None:
        if code:
            raise CompileError(f"NVRTC, {what}: {log or nvrtc.nvrtcGetErrorString(code).decode()}")

    told(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"vortex.cu", 0, None, None), "a program")
    try:
        options = (ctypes.c_char_p * 2)(f"--gpu-architecture={arch}".encode(), b"--std=c++17")
        code = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc, program, "ProgramLog").decode(errors="replace").rstrip("\0") if code else ""
        told(code, f"compiling for {arch}", log)
        return _read(nvrtc, program, "CUBIN" if arch.startswith("sm") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


@cache
def load() -> Any:
    """The library of torch's own CUDA version. Raises `OSError`."""
    error: OSError | None = None
    for name in _names():
        try:
            library = ctypes.CDLL(name)
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
        except (OSError, AttributeError) as failed:
            error = error or OSError(str(failed))
    raise error or OSError("this torch build is not for CUDA")


def _names() -> Iterator[str]:
    """Names and paths of NVRTC to try: torch's folder, then those of NVIDIA's packages beside torch."""
    if torch.version.cuda is None:
        return
    major = torch.version.cuda.partition(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if os.name == "nt" else f"libnvrtc.so.{major}"
    yield name
    torch_folder = Path(torch.__file__).parent
    inside = "bin" if os.name == "nt" else "lib"
    for folder in (torch_folder / "lib", *sorted((torch_folder.parent / "nvidia").glob(f"*/{inside}"))):
        if (folder / name).exists():
            yield str(folder / name)


def _driver() -> Any:
    library = driver_library()
    if library is None:
        raise OSError("the CUDA driver's library does not load")
    return library


def _checked(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CompileError(f"CUDA, {what}: {(text.value or b'unknown').decode()} ({code})")
