"""Small sound files to damage, and a look at them as loading does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vortex_core.checkpoint.bundle import describe, find_parts
from vortex_core.flux1.conditioning import Modulation
from vortex_core.flux1.spec import FluxSpec
from vortex_core.flux1.transformer import Transformer
from vortex_core.storage.materialize import check, is_quantized

SMALL = FluxSpec(hidden=128, heads=1, double_blocks=1, single_blocks=1, context=64, vec=64)


def plain() -> dict[str, Tensor]:
    """A transformer of one double and one single block, 1.5 M parameters in bf16, under BFL's names."""
    generator = torch.Generator().manual_seed(0)
    named = [pair for half in halves(SMALL) for pair in half.named_parameters()]
    return {name: torch.randn(p.shape, generator=generator).bfloat16() for name, p in named}


def packed(nested: bool) -> dict[str, Tensor]:
    """The same in NF4 as bitsandbytes packs it, with or without nested scales."""
    linears = {
        f"{name}.weight" for half in halves(SMALL) for name, part in half.named_modules() if is_quantized(part, name)
    }
    state: dict[str, Tensor] = {}
    for name, tensor in plain().items():
        if name in linears:
            weight, quantized = bnb.quantize_4bit(tensor, blocksize=64, quant_type="nf4", compress_statistics=nested)
            parts = {f"{name}.{key}": value.contiguous() for key, value in quantized.as_dict(packed=True).items()}
            state |= {name: weight, **parts}
        else:
            state[name] = tensor
    return state


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    """Write `tensors` with safetensors' own writer; the path."""
    save_file(tensors, path)
    return path


def write_gguf(path: Path, architecture: str, tensors: Mapping[str, tuple[Any, Any]]) -> Path:
    """Write numpy arrays with the `gguf` package; each with the type it is packed in, or None for its own. The path."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, (values, packed_as) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=packed_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def look(path: Path) -> bool:
    """Everything that `Engine.load` does with a transformer before it takes memory; whether there is one."""
    parts, configs = find_parts(path, {})
    if "transformer" not in parts:
        return False
    part = parts["transformer"]
    for half in halves(describe("transformer", part, configs.get("transformer"))):
        check(half, part.tensors)
    return True


def read(path: Path) -> None:
    """Every canonical tensor, decoded."""
    part = find_parts(path, {})[0]["transformer"]
    for half in halves(describe("transformer", part)):
        for name, _ in half.named_parameters():
            part.tensors.read(name)


def halves(spec: FluxSpec) -> list[nn.Module]:
    """The two modules that a transformer's file fills, on `meta`."""
    with torch.device("meta"):
        return [Transformer(spec), Modulation(spec)]
