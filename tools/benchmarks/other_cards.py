"""Kernels as other cards get them: every launch compiled for a card that is not here, and run here from its PTX.

`python tools/benchmarks/other_cards.py 86` prints one JSON line for each kernel of a step, a decode, a product and the
decoder as compute capability 8.6 gets it: registers, bytes on the stack (spilled, that is), and shared memory. It needs
no GPU. `running` also runs what was compiled: a driver takes the PTX of an older card. It needs a GPU and CuPy.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vortex_core.kernels import Moments, ScaledTensor, Window, fused, most_parts
from vortex_core.kernels.card import Card
from vortex_core.kernels.scaled_tensor import FP8, empty_heads

BF16, INT8 = torch.bfloat16, torch.int8
KB = 1024
CARDS = {  # compute capability to a card of it; the bytes of shared memory are CUDA's
    80: Card(108, 163 * KB, copies=False, early=False),
    86: Card(28, 99 * KB, copies=False, early=False),
    89: Card(46, 99 * KB, copies=False, early=False),
    120: Card(70, 99 * KB, copies=True, early=False),
}
MODULES = ("convolution", "decoder_attention", "fp8_attention", "int8_product", "launch")


class Build(NamedTuple):
    """A kernel as it was compiled: `stack` are bytes of a thread that do not fit into its registers."""

    kernel: str
    constants: dict[str, Any]
    warps: int
    registers: int
    stack: int
    shared: int


@contextmanager
def compiling(capability: int, then: Callable[[Any, dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside, launches only compile for `capability`, and go on to `then(compiled, arguments, grid)`."""

    class Driver:
        """Stands for a card's driver where kernels are compiled."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: f"sm_{capability}")  # builds are kept by it
        get_current_stream = staticmethod(lambda device: 0)

    original = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        before, driver._active = driver._active, Driver()
        try:
            compiled = original(kernel, *args, grid=grid, warmup=True, **kwargs)
            arguments = kernel.device_caches[f"sm_{capability}"][4](*args, **kwargs)[0]
        finally:
            driver._active = before
        then(compiled, arguments, grid)
        return compiled

    modules = [sys.modules[f"vortex_core.kernels.{name}"] for name in MODULES]
    cards = [module.card for module in modules]
    JITFunction.run = run
    for module in modules:
        module.card = lambda device: CARDS[capability]
    try:
        yield
    finally:
        JITFunction.run = original
        for module, card in zip(modules, cards, strict=True):
            module.card = card


@contextmanager
def running(capability: int) -> Iterator[None]:
    """Inside, kernels are those of `capability`, from their PTX, on the GPU that is here."""
    import cupy
    import numpy as np

    kinds = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}
    functions: dict[int, Any] = {}

    def launch(compiled: Any, arguments: dict[str, Any], grid: Any) -> None:
        if id(compiled) not in functions:
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(compiled.asm["ptx"])
                file.flush()
                function = cupy.RawModule(path=file.name).get_function(compiled.metadata.name)
            function.max_dynamic_shared_size_bytes = compiled.metadata.shared
            functions[id(compiled)] = compiled, function
        values = []
        for name, kind in compiled.src.signature.items():
            if kind != "constexpr":
                value = arguments[name]
                values.append(np.uintp(value.data_ptr()) if kind[0] == "*" else kinds[kind](value))
        shape = (*grid, 1, 1)[:3]
        threads = (32 * compiled.metadata.num_warps, 1, 1)
        # Triton's kernels end with two pointers to memory of their own, which these do not use
        functions[id(compiled)][1](
            shape, threads, (*values, np.uintp(0), np.uintp(0)), shared_mem=compiled.metadata.shared
        )

    with compiling(capability, launch):
        yield
    torch.cuda.synchronize()


def build(compiled: Any, arguments: dict[str, Any]) -> Build:
    """What was compiled, by the disassembler that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(found) for found in re.findall(r"(?:REG|STACK):(\d+)", usage)[:2])
    constants = {name: arguments[name] for name, kind in compiled.src.signature.items() if kind == "constexpr"}
    constants = {name: value for name, value in constants.items() if isinstance(value, int | float)}
    metadata = compiled.metadata
    return Build(metadata.name, constants, metadata.num_warps, registers, stack, metadata.shared)


# --- every kernel of a picture at full size, with uninitialized tensors --------------------------------------------


def operand(tokens: int, width: int, dtype: torch.dtype) -> ScaledTensor:
    scale = torch.empty(1, tokens) if dtype.itemsize == 1 else None
    return ScaledTensor(torch.empty(1, tokens, width, dtype=dtype), scale)


def step(dtype: torch.dtype) -> None:
    """The kernels of a step whose operands are of `dtype`."""
    tokens, hidden, mlp = 1280, 3072, 12288
    for n, k in ((mlp, hidden), (hidden, mlp), (hidden, hidden + mlp)):
        packed, absmax, scale = torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 64), torch.empty(n)
        if dtype != INT8:
            fused.dequantize(packed, absmax, torch.empty(n, k, dtype=dtype), None if dtype == BF16 else scale)
        else:  # the decode to it is in CUDA C everywhere
            for m in (1280, 256):
                x, weight = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
                fused.multiply_int8(
                    x, torch.empty(m), weight, scale, torch.empty(n).to(BF16), torch.empty(m, n).to(BF16)
                )
    x, y = torch.empty(2, 1, tokens, hidden, dtype=BF16)
    wide, row = torch.empty(1, tokens, mlp, dtype=BF16), torch.empty(hidden, dtype=BF16)
    fused.modulate(x, row, row, operand(tokens, hidden, dtype))
    fused.residual_modulate(x, y, row, row, row, operand(tokens, hidden, dtype))
    if dtype == BF16:  # with NAG attention is the library's in every precision
        fused.guide(x, y, torch.empty(3), torch.empty_like(x))
    qkv = torch.empty(1, tokens, 3, 24, 128, dtype=BF16)
    norm, angle = qkv[0, 0, 0, 0], torch.empty(tokens, 64)
    if dtype == FP8:
        heads = empty_heads(qkv)
        fused.pack_heads(qkv, [norm] * 4, 256, angle, angle, heads)
        fused.attend_heads(heads, qkv[:, :, 0])
    else:
        fused.rotate(qkv, norm, norm, angle, angle)
    if dtype != BF16:
        fused.gelu(wide, operand(tokens, mlp, dtype))
        fused.gelu(wide, operand(tokens, hidden + mlp, dtype), x)
        fused.quantize(x, operand(tokens, hidden, dtype))


def picture(channels: int, height: int, width: int) -> Tensor:
    return torch.empty(1, height, width, channels, dtype=BF16).permute(0, 3, 1, 2)


def decoder() -> None:
    """The kernels of the decoder: each width of its maps."""
    size = 64
    for inside, outside in ((16, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 3)):
        x, out, bias = picture(inside, size + 2, size + 2), picture(outside, size, size), torch.empty(outside).to(BF16)
        moments = Moments(torch.empty(3, 32, most_parts(outside, size, size))) if outside > 3 else None
        fused.convolve(
            x,
            picture(inside, 3, 3).expand(outside, -1, -1, -1).contiguous(memory_format=torch.channels_last),
            bias,
            out,
            moments,
        )
    for channels in (512, 256, 128):
        x, bordered, row = (
            picture(channels, size, size),
            picture(channels, size + 2, size + 2),
            torch.empty(channels).to(BF16),
        )
        moments, terms = Moments(torch.empty(3, 32, most_parts(channels, size, size))), torch.empty(2, channels)
        fused.group_moments(x, moments)
        fused.norm_terms(moments, row, row, 1e-6, terms)
        window = Window(x[:, :, 0], x, x[:, :, 0])
        fused.norm_silu(window, terms[0], terms[1], bordered)
        fused.bordered(window, bordered)
        if channels > 128:
            taps = torch.empty(4 * channels, 4 * channels, dtype=BF16)
            fused.corner_taps(torch.empty(channels, channels, 3, 3, dtype=BF16), taps)
            moments = Moments(torch.empty(3, 32, most_parts(channels, 2 * size, 2 * size, doubled=True)))
            fused.convolve_doubled(bordered, taps, row, picture(channels, 2 * size, 2 * size), moments)
    fused.attend(*torch.empty(4, size * size, 512, dtype=BF16))


def builds(capability: int) -> list[Build]:
    """Every kernel that a card of `capability` gets, in its order of launch; in fp8 from 8.9 on."""
    found: dict[str, Build] = {}

    def take(compiled: Any, arguments: dict[str, Any], grid: Any) -> None:
        if compiled.hash not in found:
            found[compiled.hash] = build(compiled, arguments)

    with compiling(capability, take):
        for dtype in (BF16, INT8, *([FP8] if capability >= 89 else [])):
            step(dtype)
        decoder()
    return list(found.values())


if __name__ == "__main__":
    for each in builds(int(sys.argv[1])):
        print(json.dumps(each._asdict()))
