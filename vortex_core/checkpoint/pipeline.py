"""The parts of a diffusers pipeline, also of one that is compiled or whose weights hooks have moved away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import VortexCheckpointError, quoted
from ..storage.files import StateDict
from .dialects import Part, find_part

if TYPE_CHECKING:
    from diffusers import FluxPipeline


def member(pipe: FluxPipeline, name: str) -> Any:
    """A pipeline's attribute `name`. Raises `VortexCheckpointError` where it is missing or None."""
    found = getattr(pipe, name, None)
    if found is None:
        raise VortexCheckpointError(
            f"The pipeline ({type(pipe).__name__}) has no {name}. Vortex takes a diffusers FluxPipeline with all of "
            "its parts: load it without leaving any out."
        )
    return found


def part_of(pipe: FluxPipeline, name: str, kind: str) -> tuple[Part, dict[str, Any]]:
    """The module `name` as the part `kind`, and its config. Raises `VortexCheckpointError` where it cannot be read."""
    where = f"The pipeline's {name}"
    module = member(pipe, name)
    module = getattr(module, "_orig_mod", module)  # inside a compiled one
    try:
        method, config = getattr(module, "quantization_method", None), module.config
        config = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        state = weights_of(module)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise VortexCheckpointError(
            f"{where} is {type(module).__name__}, which Vortex cannot read ({quoted(str(error))}). Load the pipeline "
            "anew with diffusers' FluxPipeline.from_pretrained."
        ) from error
    away = [key for key, tensor in state.items() if tensor.is_meta] or ([*state] if _on_disk(module) else [])
    if away:
        raise VortexCheckpointError(
            f"{where} has {len(away)} tensors that are not in memory, such as {away[0]}. Take the engine before the "
            "pipeline is offloaded, or call pipe.remove_all_hooks() first."
        )
    part = find_part(StateDict(state, where), kind)
    if part is None:
        raise VortexCheckpointError(f"{where} is {type(module).__name__}, and not FLUX's {name}.")
    if method is not None and not part.is_nf4:
        raise VortexCheckpointError(
            f"{where} is quantized ({quoted(str(method))}); Vortex takes 16 or 32 bits, or bitsandbytes NF4."
        )
    return part, config


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state; tensors that accelerate's hooks have moved away come from where they keep them."""
    state = dict(module.state_dict())
    for path, child in module.named_modules():
        hook = getattr(child, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            kept = getattr(one, "weights_map", None) or {}
            for name in child.state_dict() if kept else ():
                whole = f"{path}.{name}".lstrip(".")
                if state[whole].is_meta and name in kept:
                    state[whole] = kept[name]
    return state


def _on_disk(module: nn.Module) -> bool:
    """Whether diffusers has moved groups of weights to files, and left uninitialized memory in their place."""
    hooks = [
        hook
        for child in module.modules()
        for hook in getattr(getattr(child, "_diffusers_hook", None), "hooks", {}).values()
    ]
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for hook in hooks)
