"""`vortex quantize`: a transformer from any file that is read, written in NF4."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..device.select import resolve_device
from ..errors import VortexCheckpointError, VortexInputError
from ..flux1.conditioning import Modulation
from ..flux1.spec import FluxSpec
from ..flux1.transformer import Transformer
from ..storage.files import PICKLES
from ..storage.materialize import Target, check
from ..utils.inference_mode import inference_mode
from ..utils.paths import expanded
from ..utils.temporary_files import is_abandoned, is_part, partial
from .bundle import WORDS, describe, find_parts
from .dialects import Part
from .identity import check_unchanged, identity
from .write import CANONICAL, DIFFUSERS, Naming, Wanted, write_nf4

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"  # what diffusers looks for


def quantize_file(
    source: str | Path,
    target: str | Path,
    *,
    device: str | torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the transformer at `source` in NF4, tensor by tensor; the target.

    A `target` that ends in .safetensors is one file with BFL's names. Any other is a folder that diffusers'
    `FluxTransformer2DModel.from_pretrained` reads; in it the last projection is NF4, too, as diffusers has it.
    NF4 sources are copied bit for bit. Raises `VortexCheckpointError` where there is no whole transformer, and
    `VortexInputError` for an impossible target, before anything is written; `OSError` where the disk is full, and then
    nothing is left behind.
    """
    where = resolve_device(device)
    path = expanded(target)
    check_target(path)
    part, spec = _transformer(source)
    with torch.device("meta"):
        modules = [(Transformer(spec), ""), (Modulation(spec), "")]
    total = sum(check(module, part.tensors, prefix) for module, prefix in modules)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(min(done, total), total)

    read = Target(where, torch.float32, progress)
    metadata = {"vortex": __version__, "source": Path(source).name}
    before = identity(part.stored.raw.files)

    def write(written: Path, naming: Naming) -> None:
        write_nf4(written, part.tensors, Wanted.of(modules, naming), read, metadata, naming)
        check_unchanged(part.stored.raw, before, str(source))

    with inference_mode():
        if path.suffix == ".safetensors":
            with partial(path) as written:
                write(written, CANONICAL)
            return path
        with _folder(path), partial(path / WEIGHTS) as written:
            write(written, DIFFUSERS)
            with partial(path / CONFIG) as config:  # in its place before the weights: see `is_unfinished`
                config.write_text(json.dumps(diffusers_config(spec), indent=2))
    return path


def _transformer(source: str | Path) -> tuple[Part, FluxSpec]:
    parts, configs = find_parts(expanded(source), {})
    if "transformer" not in parts:
        raise VortexCheckpointError(f"{source} does not hold {WORDS['transformer']}.", path=str(source))
    return parts["transformer"], describe("transformer", parts["transformer"], configs.get("transformer"))


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Inside, a folder to write into. A new one is removed again where that fails."""
    new = not path.exists() or is_unfinished(path)
    path.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                (path / CONFIG).unlink(missing_ok=True)
                path.rmdir()
        raise


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds nothing but the remains of a `quantize_file` that was killed. Raises `OSError`."""
    if not folder.is_dir():
        return False
    inside = list(folder.iterdir())
    ours = [path for path in inside if is_part(path.name)]
    names = {path.name for path in inside if path not in ours}
    return names <= ({CONFIG} if ours else set()) and all(map(is_abandoned, ours))


def check_target(path: Path) -> None:
    """Raise `VortexInputError` unless `path` can be a .safetensors file, or a folder without other files."""
    if not path.parent.is_dir():
        raise VortexInputError(f"There is no folder {path.parent}; make it first.")
    if path.suffix == ".safetensors":
        if path.is_dir():
            raise VortexInputError(f"{path} is a folder; choose another name.")
    elif path.suffix in (*PICKLES, ".gguf") or path.is_file():
        raise VortexInputError(f"The target must end in .safetensors, or be a folder, not {path.name!r}.")
    elif path.is_dir() and any(f.name not in (WEIGHTS, CONFIG) and not is_part(f.name) for f in path.iterdir()):
        raise VortexInputError(f"{path} holds other files; choose another name.")


def diffusers_config(spec: FluxSpec) -> dict[str, Any]:
    """The config.json of a transformer that `write_nf4` wrote with the `DIFFUSERS` names."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": spec.head_dim,
        "axes_dims_rope": list(spec.axes),
        "guidance_embeds": False,
        "in_channels": spec.in_channels,
        "joint_attention_dim": spec.context,
        "num_attention_heads": spec.heads,
        "num_layers": spec.double_blocks,
        "num_single_layers": spec.single_blocks,
        "patch_size": 1,
        "pooled_projection_dim": spec.vec,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["context_embedder", "time_text_embed", "x_embedder"],
        },
    }
