"""What this machine can do, and what to fix: the checks behind `vortex doctor`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from .checkpoint.bundle import open_bundle
from .errors import VortexError
from .linear import bitsandbytes_declined

SMALLEST_CARD = 8e9  # bytes; the smallest card the default budget of 6.5 GB suits
PACKAGES = ("transformers", "tokenizers", "safetensors", "diffusers")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `state` is `ok`, `note` (works, could be better) or `fault`; `fix` says what to do."""

    name: str
    state: str
    detail: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Look at Python, torch, the GPU, bitsandbytes, packages and the bundled model. Loads no weights."""
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", "ok", torch.__version__)
    yield from _devices()
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            fix = f"pip install {package}"
            if package == "diffusers":
                yield Finding(package, "note", "missing; only Engine.from_pipeline needs it", fix)
            else:
                yield Finding(package, "fault", "missing", fix)
    yield _bundled_model()


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        detail = f"none; torch was built for CUDA {built}" if built else "none; this torch build is for the CPU only"
        fix = "Pictures are drawn on the CPU, fine for the bundled model. "
        fix += "Update the NVIDIA driver." if built else "With an NVIDIA card, install a CUDA build of torch."
        yield Finding("GPU", "note", detail, fix)
        yield _bitsandbytes(torch.device("cpu"))
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)
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


def _bitsandbytes(device: torch.device) -> Finding:
    try:
        declined = bitsandbytes_declined(device)
    except torch.OutOfMemoryError:
        return Finding("NF4", "note", "no room to try it", "Close other programs that use the card, and ask again.")
    if declined is None:
        return Finding("NF4", "ok", f"bitsandbytes {metadata.version('bitsandbytes')} decodes on {device}")
    fix = "pip install --upgrade bitsandbytes"
    if "bitsandbytes" not in sys.modules:
        return Finding("NF4", "fault", f"bitsandbytes: {declined}; it is needed to quantize", fix)
    return Finding("NF4", "note", f"reference backend, slower; bitsandbytes on {device}: {declined}", fix)


def _bundled_model() -> Finding:
    try:
        bundle = open_bundle("tiny")
    except VortexError as error:
        return Finding("bundled model", "fault", str(error), "pip install --force-reinstall --no-deps vortex-flux")
    return Finding("bundled model", "ok", f"{bundle.name}, {bundle.vae.sample_size} x {bundle.vae.sample_size}")
