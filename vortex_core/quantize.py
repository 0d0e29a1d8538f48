"""A transformer in any dialect to one NF4 file: what `vortex quantize` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__
from .checkpoint.bundle import WORDS, find_parts
from .checkpoint.config import infer_flux
from .checkpoint.materialize import Target, check
from .checkpoint.write import write_nf4
from .conditioning import Modulation
from .device import resolve_device
from .errors import VortexCheckpointError
from .linear import ReferenceBackend
from .spec import FluxSpec
from .transformer import Transformer


def quantize_file(
    source: str | Path,
    target: str | Path,
    *,
    device: str | torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the transformer at `source` to `target` in NF4 under BFL's names, tensor by tensor; the target.

    NF4 sources are copied bit for bit. Raises `VortexCheckpointError` where there is no whole transformer, before
    anything is written; `OSError` where the disk is full, and then nothing is left behind.
    """
    where = resolve_device(device)
    parts, configs = find_parts(Path(source).expanduser(), {})
    if "transformer" not in parts:
        raise VortexCheckpointError(f"{source} does not hold {WORDS['transformer']}.", path=str(source))
    tensors = parts["transformer"].tensors
    config = configs.get("transformer")
    spec = FluxSpec.from_diffusers(config) if config is not None else infer_flux(tensors)
    with torch.device("meta"):
        modules = [(Transformer(spec), ""), (Modulation(spec), "")]
    total = sum(check(module, tensors, prefix) for module, prefix in modules)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(min(done, total), total)

    path = Path(target).expanduser()
    with torch.inference_mode():
        read = Target(where, torch.float32, ReferenceBackend(), progress)
        write_nf4(path, tensors, modules, read, {"vortex": __version__, "source": Path(source).name})
    return path
