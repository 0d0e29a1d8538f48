"""The host's own Flux over an engine's weights: its code, with weights on `meta` and products by the engine.

So nodes of other packs find the modules that they reach for. `native_steps` says how a step is computed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from .native_patches import cannot_be
from .native_steps import Steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..vortex_core import Engine

log = logging.getLogger(__name__)

NORMS = ("query_norm", "key_norm")


def model_of(engine: Engine) -> nn.Module:
    """What the host takes for the model of `engine`; its `vortex` is the `Steps`.

    It is the host's Flux. Where the host has none, or another one than this was written for, it is an empty module: it
    can be loaded and unloaded, and there is no MODEL.
    """
    try:
        return _flux(engine)
    except Exception as error:
        log.warning("No MODEL here: this ComfyUI's Flux is not what Vortex knows (%r)", error)
        return _stand_in(engine)


def is_native(model: nn.Module) -> bool:
    """Whether this is the host's Flux, so that there is a MODEL."""
    return hasattr(model, "diffusion_model")


def _stand_in(engine: Engine) -> nn.Module:
    import torch

    class VortexFlux(torch.nn.Module):
        """It has no weights, so nobody moves any without the engine's knowledge."""

    model = VortexFlux()
    model.vortex = Steps(engine)
    return model


def _flux(engine: Engine) -> Any:
    """The host's Flux of an engine's sizes, on `meta`."""
    import comfy.model_detection
    import comfy.supported_models
    import torch

    from ..vortex_core.flux1.conditioning import Modulation
    from ..vortex_core.flux1.transformer import Transformer

    flux, steps = engine.spec.flux, Steps(engine)
    with torch.device("meta"):
        shapes = {**Transformer(flux).state_dict(), **Modulation(flux).state_dict()}
    unet = comfy.model_detection.detect_unet_config(shapes, "")
    unet |= {"hidden_size": flux.hidden, "num_heads": flux.heads, "axes_dim": list(flux.axes), "theta": flux.theta}
    unet |= {"context_in_dim": flux.context, "vec_in_dim": flux.vec, "mlp_ratio": float(flux.mlp_ratio)}
    unet |= {"depth": flux.double_blocks, "depth_single_blocks": flux.single_blocks, "dtype": engine.dtype}
    config = comfy.supported_models.FluxSchnell(unet)
    config.custom_operations = _operations(steps)
    model = config.get_model({}, device=torch.device("meta"))
    model.device = engine.device
    _take_over(model, steps)
    return model


def _operations(steps: Steps) -> type:
    """The host's operations, but for linears: those have weights of the true shape on `meta`, and ask for values."""
    import comfy.ops
    import torch

    class Linear(comfy.ops.disable_weight_init.Linear):  # type: ignore[misc]
        """`canonical`: its name in the engine."""

        canonical = ""

        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
        ) -> None:
            torch.nn.Linear.__init__(self, in_features, out_features, bias, device="meta", dtype=dtype)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:
            return steps.linear(self.canonical, x)

    return type("VortexOps", (comfy.ops.disable_weight_init,), {"Linear": Linear})


def _take_over(model: Any, steps: Steps) -> None:
    """Have `steps` stand for the weights, and for the innermost forward, of the host's `model`."""
    import torch

    flux = model.diffusion_model
    for name, module in flux.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.canonical = name
        elif name.rpartition(".")[2] in NORMS:
            module.forward = torch.compiler.disable(partial(_norm, steps, module, name))
    steps.attach(model)
    model.vortex = steps
    model.memory_required = steps.memory_required
    model.state_dict_for_saving = _refuse_to_save
    for module in (model, flux):  # `.to`, `.half`, `.cuda`: there are no weights to move
        module._apply = partial(stay, weakref.ref(module))  # weak: in a circle, it would outlive its patchers


def _norm(steps: Steps, module: nn.Module, name: str, x: Tensor) -> Tensor:
    """The host's norm with the engine's scale, which hosts name differently."""
    (kept,) = module._parameters
    parameters = module._parameters.copy()
    module._parameters[kept] = steps.norm(name, x)  # type: ignore[assignment]
    try:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    finally:
        module._parameters.update(parameters)


def _refuse_to_save(*parts: Any, **named: Any) -> NoReturn:
    raise cannot_be("saved")  # old hosts ask the model, new ones its patcher


def stay(module: Callable[[], nn.Module], *ignored: Any, **options: Any) -> nn.Module:
    """In place of `_apply` of a module whose weights are an engine's."""
    return module()
