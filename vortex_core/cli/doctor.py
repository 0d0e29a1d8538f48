"""What this machine can do, and what to fix: the checks behind `vortex doctor`."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from ..checkpoint.bundle import open_bundle
from ..device.select import device_words, other_accelerator
from ..errors import GB
from ..kernels import choose_kernels, compiled_declined
from ..quant.backends import bitsandbytes_declined, choose_backend
from ..runtime.loading import CONTEXT, check_budget
from ..runtime.modes import choose_precision
from ..utils.packages import first_line, missing, remedy
from .plan_report import propose

SMALLEST_CARD = 8e9  # bytes; the smallest card the default budget of 6.5 GB suits
UNKNOWN = "of unknown version"
NO_ROOM = "Close other programs that use the card, and ask again."
NEEDED = ("transformers", "tokenizers", "safetensors")
WANTED = {  # the module that is used, its package, and what is not there without it
    "diffusers": ("diffusers", "only Engine.from_pipeline and `vortex bench compare` need it"),
    "gguf": ("gguf", "only GGUF files need it"),
    "matplotlib.figure": ("matplotlib", "only plots need it"),
    "psutil": ("psutil", "only figures of host memory need it"),
    "pynvml": ("nvidia-ml-py", "only figures of other programs' VRAM, clocks and temperature need it"),
    "scipy.stats": ("scipy", "only comparisons of benchmarks need it"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `state` is `ok`, `note` (works, could be better) or `fault`; `fix` says what to do."""

    name: str
    state: str
    detail: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Look at Python, torch, the GPU, its precision, bitsandbytes, packages and the bundled model. Loads no weights.

    A part that raises anything is a finding, too.
    """
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", "ok", torch.__version__)
    yield from _devices()
    for package in NEEDED:
        why = missing(package)
        fix = "" if why is None else remedy(package)
        yield Finding(package, "ok" if why is None else "fault", why or _version(package), fix)
    for module, (package, purpose) in WANTED.items():
        yield _wanted(module, package, purpose)
    yield _bundled_model()


def _wanted(module: str, package: str, purpose: str) -> Finding:
    why = missing(module)
    if why is None:
        return Finding(package, "ok", _version(package))
    return Finding(package, "note", f"{why}; {purpose}", remedy(module))


def _version(package: str) -> str:
    try:
        return metadata.version(package) or UNKNOWN
    except Exception:  # it imports, but its metadata are missing or damaged
        return UNKNOWN


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built, other = torch.version.cuda, other_accelerator()
        detail = f"none; torch was built for CUDA {built}" if built else "none; this torch build is for the CPU only"
        if other is not None:
            detail = f"{device_words(other)}, which Vortex does not use"
        fix = "Pictures are drawn on the CPU, fine for the bundled model. "
        fix += "Update the NVIDIA driver." if built else "With an NVIDIA card, install a CUDA build of torch."
        yield Finding("GPU", "note", detail, fix)
        yield _bitsandbytes(torch.device("cpu"))
        yield _precision(torch.device("cpu"), "precision")
        return
    for index in range(torch.cuda.device_count()):
        try:
            found = _gpu(index)
        except Exception as error:
            fix = "Update the NVIDIA driver, or install a torch build that fits it."
            found = Finding(f"GPU {index}", "fault", f"it does not answer: {first_line(error)}", fix)
        yield found
        if found.state != "fault":
            precision = _precision(torch.device("cuda", index), f"precision, GPU {index}")
            yield precision
            yield _budget(index, scaled=precision.state == "ok")
    yield _triton(torch.device("cuda", 0))
    yield _bitsandbytes(torch.device("cuda", 0))


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    detail = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{total / 1e9:.1f} GB of VRAM, {free / 1e9:.1f} GB free"
    )
    name = f"GPU {index}"
    if (properties.major, properties.minor) < (8, 0):
        return Finding(name, "fault", detail, "FLUX needs native bf16: RTX 30 series or later.")
    if total < SMALLEST_CARD:
        return Finding(
            name, "note", detail, "FLUX.1-schnell fits with weights that stream; `vortex plan --vram` tells the cost."
        )
    if free < SMALLEST_CARD * 0.875:
        return Finding(name, "note", detail, "Close other programs that use the card: `nvidia-smi` lists them.")
    return Finding(name, "ok", detail)


def _precision(device: torch.device, name: str) -> Finding:
    """Which precision `fast` gets on `device`, why, and what would make it faster. Compiles and tries kernels."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        choice = choose_precision("fast", device, dtype, choose_backend(device), choose_kernels(device))
    except torch.OutOfMemoryError:
        return Finding(name, "note", "no room to try it", NO_ROOM)
    except Exception as error:
        return Finding(name, "note", f"it cannot be tried: {first_line(error)}", "Update torch and the NVIDIA driver.")
    slow = device.type == "cuda" and not choice.precision.scaled
    fixes = dict.fromkeys(declined.fix for declined in choice.declined.values() if declined.fix)
    detail = f"`fast` means {choice.precision} here: {choice.reason}"
    return Finding(name, "note" if slow else "ok", detail, " ".join(fixes))


def _budget(index: int, *, scaled: bool) -> Finding:
    """What the default budget leaves in host memory, and what a larger one buys on this card; more if in 8 bits."""
    name = f"budget, GPU {index}"
    try:
        total = torch.cuda.mem_get_info(index)[1]
        default, most = (check_budget(None, total) or 0) / GB, int((total - CONTEXT) / GB * 10) / 10
        usual = propose(default, None, None, 1, None, {})
        detail = f"{default:g} GB by default; FLUX.1-schnell then has {usual.plan.hosted / GB:.1f} GB in host memory"
        if most <= default:
            return Finding(name, "ok", detail)
        richest = propose(most, None, None, 1, None, {})
        gains = [f"{(usual.plan.hosted - richest.plan.hosted) / GB:.1f} GB less to copy for a new prompt"]
        if richest.plan.copies and scaled:
            gains.append(f"{len(richest.plan.copies)} blocks decoded to 8 bits once, not in each step")
        return Finding(name, "ok", detail, f"For speed, name up to {most:g} GB as `vram_budget`: {', '.join(gains)}.")
    except Exception as error:  # of torch or of the plan
        return Finding(name, "note", f"it cannot be planned: {first_line(error)}")


def _triton(device: torch.device) -> Finding:
    """Triton, by either name; without it, which kernels run."""
    why = missing("triton")
    if why is None:
        windows = _version("triton-windows")
        return Finding("triton", "ok", _version("triton") if windows == UNKNOWN else f"triton-windows {windows}")
    declined = compiled_declined(device)
    runs = "kernels in CUDA C run instead" if declined is None else f"kernels in CUDA C: {declined}"
    return Finding("triton", "note", f"{why}; {runs}", remedy("triton"))


def _bitsandbytes(device: torch.device) -> Finding:
    try:
        declined = bitsandbytes_declined(device)
    except torch.OutOfMemoryError:
        return Finding("NF4", "note", "no room to try it", NO_ROOM)
    if declined is None:
        return Finding("NF4", "ok", f"bitsandbytes {_version('bitsandbytes')} decodes on {device}")
    if device.type == "cuda" and compiled_declined(device) is None:
        return Finding("NF4", "ok", f"our own kernel decodes on {device}; bitsandbytes: {declined}")
    detail = f"plain torch, slower; bitsandbytes on {device}: {declined}"
    return Finding("NF4", "note", detail, "pip install --upgrade bitsandbytes")


def _bundled_model() -> Finding:
    try:
        bundle = open_bundle("tiny")
    except Exception as error:  # a damaged file, or a package that fails
        fix = "pip install --force-reinstall --no-deps vortex-flux"
        return Finding("bundled model", "fault", first_line(error), fix)
    side = bundle.spec.vae.sample_size
    return Finding("bundled model", "ok", f"{bundle.name}, {side} x {side}")
