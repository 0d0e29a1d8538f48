"""Which precision a mode gets on a device: `fast` the fastest in 8 bits that runs, else `exact`; the log says why.

int8 on compute capability 8.0 to 8.9, where it is twice as fast as fp8 or more (vendor's figures), fp8 on 9.0, where it
was measured. On other cards a product of each is timed.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import VortexInputError
from ..kernels import Kernels, attends_in_fp8, compiled_declined, fused_declined, reference
from ..kernels.scaled_tensor import FP8, ScaledTensor
from ..quant.backends import Backend, ReferenceBackend
from ..quant.precision import EXACT, Fp8, Int8, Precision
from ..utils.packages import first_line, missing, remedy
from ..utils.timing import Stopwatch, mark

log = logging.getLogger(__name__)

NAMES = ("int8", "fp8")  # of the precisions in 8 bits
MEASURED = (9, 0)  # the compute capability on which both were timed; older cards go by their vendor's figures
TIMED = (1280, 3072, 12288)  # rows, K and N of the product that is timed: the MLP's at 512 x 512


class Declined(NamedTuple):
    """Why a precision cannot run, and what to do about it; `fix` is empty where nothing helps."""

    why: str
    fix: str = ""


class Choice(NamedTuple):
    """A precision, why it was taken, and the others in 8 bits, by name, that were declined."""

    precision: Precision
    because: str
    declined: dict[str, Declined]

    @property
    def reason(self) -> str:
        """Why it is this one, and why no other, in words."""
        others = (f"{name} declined: {declined.why}" for name, declined in self.declined.items())
        return "; ".join((self.because, *others))


def choose_precision(
    mode: str, device: torch.device, dtype: torch.dtype, backend: Backend | None, kernels: Kernels
) -> Choice:
    """The precision of `mode`. Where none of 8 bits can run, `fast` gets `exact`. Logs the choice and why.

    Raises `VortexInputError` where `fp8` or `int8` is asked for by name and cannot run.
    """
    choice = _chosen(mode, device, dtype, backend, kernels)
    slow = mode == "fast" and device.type == "cuda" and choice.precision is EXACT
    log.log(logging.WARNING if slow else logging.INFO, "Precision: %s (%s)", choice.precision, choice.reason)
    return choice


def _chosen(mode: str, device: torch.device, dtype: torch.dtype, backend: Backend | None, kernels: Kernels) -> Choice:
    if mode == "exact":
        return Choice(EXACT, "asked for", {})
    if mode == "fast" and device.type != "cuda":
        return Choice(EXACT, f"products in 8 bits gain nothing on {device.type}", {})
    asked = NAMES if mode == "fast" else (mode,)
    tried = {name: precision_declined(name, device, dtype, backend, kernels) for name in asked}
    declined = {name: found for name, found in tried.items() if found is not None}
    if mode != "fast":
        if mode in declined:
            why, fix = declined[mode]
            raise VortexInputError(
                f"mode '{mode}' does not work here: {why}. 'fast' takes the fastest mode that does. {fix}".rstrip()
            )
        return Choice(_made(mode, device, kernels), "asked for", {})
    names = [name for name in tried if name not in declined]
    if not names:
        return Choice(EXACT, "nothing in 8 bits runs here", declined)
    name, because = _fastest(names, device, kernels)
    return Choice(_made(name, device, kernels), because, declined)


def _fastest(names: list[str], device: torch.device, kernels: Kernels) -> tuple[str, str]:
    """The one of `names` that is the fastest on a CUDA device, and how that is known."""
    if len(names) == 1:
        return names[0], "the only one in 8 bits that runs here"
    major, minor = capability = torch.cuda.get_device_capability(device)
    if capability == MEASURED:
        return "fp8", f"the fastest that was measured on compute capability {major}.{minor}"
    if capability < MEASURED:
        return "int8", f"the fastest on compute capability {major}.{minor}, by its rates"
    times = {name: _time(_made(name, device, kernels), device) for name in names}
    took = ", ".join(f"{ms:.3f} ms in {name}" for name, ms in times.items())
    return min(times, key=lambda name: times[name]), f"the fastest here: a product takes {took}"


def precision_declined(
    name: str, device: torch.device, dtype: torch.dtype, backend: Backend | None, kernels: Kernels
) -> Declined | None:
    """Why `int8` or `fp8` cannot run, or None. On the CPU both run in plain torch, to compare."""
    if backend is None:
        return Declined("it multiplies NF4 weights, and these are not", "Leave `quantization` at 'nf4'.")
    if device.type != "cuda":
        return None
    if not backend.eight:
        other = f"only the triton and nvrtc backends decode to 8 bits, and it is {backend.name}"
        runs = compiled_declined(device) is None  # so the other was asked for
        return (None if runs else _triton_declined(device)) or Declined(other, "Leave the backend to Vortex.")
    if dtype != torch.bfloat16:
        return Declined(f"products in 8 bits end in bf16, and {dtype} was asked for", "Leave the dtype at bf16.")
    if name == "fp8":
        declined = fp8_declined(device)
        if declined is not None or backend.name == "triton":  # a sample would have Triton compile for seconds
            return declined
    return _unless(_sample_broken(name, device, backend, kernels))  # last, since it compiles kernels


def fp8_declined(device: torch.device) -> Declined | None:
    """Why products in fp8 cannot run on a CUDA device, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return Declined(f"fp8 needs compute capability 8.9, and this card has {major}.{minor}")
    return _unless(_fp8_broken(device))


def _triton_declined(device: torch.device) -> Declined | None:
    why = fused_declined(device)
    if why is None or missing("triton") is None:
        return _unless(why, "Triton needs a C compiler (gcc) and an NVIDIA driver of its time. Install or update them.")
    return Declined(why, remedy("triton"))


def _unless(
    why: str | None, fix: str = "Update torch and the NVIDIA driver, and Triton if it is there."
) -> Declined | None:
    return None if why is None else Declined(why, fix)


def _made(name: str, device: torch.device, kernels: Kernels) -> Precision:
    if name == "int8":
        return Int8(kernels)
    return Fp8(fp8_attention=device.type != "cuda" or attends_in_fp8(device))


def _time(precision: Precision, device: torch.device) -> float:
    """Milliseconds of a product: the least of several, since others may use the card, too."""
    m, k, n = TIMED
    dtype = precision.operand
    x, weight = (torch.randint(-100, 100, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    if dtype is not None and dtype != torch.int8:
        x, weight = x.to(dtype), weight.to(dtype)
    scales = [torch.ones(rows, device=device) for rows in (m, n)]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    bias, times = torch.zeros_like(out[0]), []
    for _ in range(10):
        with Stopwatch(device) as watch:
            precision.product(x, scales[0], weight, scales[1], bias, out)
            mark("product")
        times.append(1e3 * watch.phases["product"])
    return min(times)


@cache
def _fp8_broken(device: torch.device) -> str | None:
    """Why this torch cannot multiply a sample in fp8 with a scale a row, or None."""
    x, weight = (torch.ones(rows, 64, device=device).to(FP8) for rows in (16, 32))
    scales = [torch.ones(rows, device=device) for rows in (16, 32)]
    out = torch.full((16, 32), torch.nan, dtype=torch.bfloat16, device=device)
    try:
        Fp8().product(x, scales[0], weight, scales[1], torch.zeros_like(out[0]), out)
    except torch.OutOfMemoryError:  # says nothing about this torch, and must not be cached
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} does not: {first_line(error)}"
    return None if bool((out == 64).all()) else "a sample product is wrong"


def _sample_broken(name: str, device: torch.device, backend: Backend, kernels: Kernels) -> str | None:
    """Why a precision fails on a sample, or None: a weight is decoded, tokens are rounded, and both multiplied."""
    draw = torch.Generator(device).manual_seed(0)
    packed = torch.randint(0, 256, (160, 128), dtype=torch.uint8, generator=draw, device=device)
    absmax = torch.rand(160, 4, generator=draw, device=device) + 0.5
    x = torch.randn(1, 40, 256, generator=draw, device=device).bfloat16()
    try:
        found = _sample(name, backend, kernels, x, packed, absmax)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: these kernels do not work here
        return f"its kernels do not run ({first_line(error)})"
    expected = _sample(name, ReferenceBackend(), reference, x, packed, absmax).float()
    off = float((found.float() - expected).norm() / expected.norm())
    return None if off < 0.01 else f"a product in {name} differs from the reference on a sample"


def _sample(name: str, backend: Backend, kernels: Kernels, x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    precision = Int8(kernels) if name == "int8" else Fp8()
    kind, out = precision.operand, x.new_full((x.shape[1], len(packed)), torch.nan)
    scales = x.new_full((len(packed),), torch.nan, dtype=torch.float32)
    backend.row_scales(packed, absmax, scales, kind)
    weight = backend.dequantize(packed, absmax, kind, scales)
    operand = ScaledTensor(torch.empty_like(x, dtype=kind), x.new_empty(x.shape[:2], dtype=torch.float32))
    kernels.quantize(x, operand)
    assert operand.scale is not None
    precision.product(operand.values[0], operand.scale[0], weight, scales, x[0, 0, : len(packed)], out)
    return out
