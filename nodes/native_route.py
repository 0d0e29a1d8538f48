"""Which route a step takes: the engine's own, replayed, where nothing reaches into the model; else the host's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..vortex_core.flux1.spec import FluxSpec

OPTIONS = ("optimized_attention_override", "rope_options")  # of `transformer_options`, each None where it is not used
GIVEN = ("ref_latents", "attention_mask")
ABOVE = ("__init__", "forward", "_forward")  # of the host's functions: what they call is this route
Step = Callable[..., "Tensor"]


@dataclass(frozen=True, slots=True)
class Call:
    """What the host's innermost forward is called with, by its names: `x [B, C, h, w]`, `timestep [B]`, and so on."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Mapping[str, Any]

    @property
    def x(self) -> Tensor:
        return self.given["x"]  # type: ignore[no-any-return]

    @property
    def options(self) -> Mapping[str, Any]:
        return self.given.get("transformer_options") or {}

    def suits(self, flux: FluxSpec) -> bool:
        """Whether texts and timesteps are such as an engine draws from: `context [B, N, D]`, `y [B, vec or more]`."""
        x, txt, pooled = self.x, self.given.get("context"), self.given.get("y")
        return (
            x.ndim == 4
            and x.shape[1] == flux.latent_channels
            and txt is not None
            and txt.ndim == 3
            and (len(txt), txt.shape[2]) == (len(x), flux.context)
            and txt.shape[1] > 0
            and (pooled is None or (pooled.ndim == 2 and len(pooled) == len(x) and pooled.shape[1] >= flux.vec))
            and self.given["timestep"].shape == (len(x),)
        )


class Original:
    """The host's Flux as it was built, to notice what has changed since."""

    def __init__(self, flux: nn.Module) -> None:
        self.name = "_forward" if hasattr(flux, "_forward") else "forward"  # the innermost; the latter before 0.3.52
        self.forward: Step = getattr(type(flux), self.name)
        self._signature = inspect.signature(self.forward)
        functions = {name: one for name, one in vars(type(flux)).items() if inspect.isfunction(one)}
        self._functions = {name: one for name, one in functions.items() if name not in ABOVE}
        every = list(flux.modules())
        self._children = [(module._modules, list(module._modules.values())) for module in every]
        self._modules = [(module, module.__dict__.get("forward")) for module in every[1:]]
        self._classes = {type(module): type(module).forward for module, _ in self._modules}

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of the innermost forward, by name."""
        given = dict(self._signature.bind(None, *args, **kwargs).arguments)
        return Call(args, kwargs, given | given.pop("kwargs", {}))

    def declined(self, flux: nn.Module, call: Call, spec: FluxSpec) -> str | None:
        """Why the engine's own step cannot be taken, or None."""
        for name in ("patches", "patches_replace"):
            there = sorted(str(kind) for kind, what in (call.options.get(name) or {}).items() if what)
            if there:
                return f"{name} of {', '.join(there)}"
        for name in OPTIONS:
            if call.options.get(name) is not None:
                return name
        control = call.given.get("control") or {}
        if any(one is not None for several in control.values() for one in several or ()):
            return "a ControlNet"
        for name in GIVEN:
            if call.given.get(name) is not None:
                return name
        if not call.suits(spec):
            return "inputs that are not those of FLUX.1-schnell"
        return _of_another_size(call.x) or self._changed(flux)

    def _changed(self, flux: nn.Module) -> str | None:
        """What of the host's modules is not as it was built, or None."""
        for name, function in self._functions.items():
            if getattr(type(flux), name) is not function or not _is_the_hosts(function):
                return f"another {name} of the class {type(flux).__name__}"
            if getattr(getattr(flux, name), "__func__", None) is not function:
                return f"another {name}"
        for now, before in self._children:
            if list(now.values()) != before:  # by identity, as modules compare
                return _replaced(list(now.values()), before)
        for module, forward in self._modules:
            own = module.__dict__.get("forward")  # unpatching leaves the bound original there
            if own is not forward and getattr(own, "__func__", None) is not self._classes[type(module)]:
                return f"another forward of {type(module).__name__}"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"hooks of {type(module).__name__}"
        changed = [kind for kind, forward in self._classes.items() if kind.forward is not forward]
        return f"another forward of the class {changed[0].__name__}" if changed else None


def _of_another_size(x: Tensor) -> str | None:
    from ..vortex_core.errors import VortexInputError
    from ..vortex_core.flux1.request import check_size

    try:
        check_size(*pixels(x))
    except VortexInputError as error:
        return f"the size: {error}"
    return None


def pixels(x: Tensor) -> tuple[int, int]:
    """Height and width of the pictures of latents `x`, once the host has made them even."""
    height, width = x.shape[-2:]
    return 16 * -(-height // 2), 16 * -(-width // 2)


def _is_the_hosts(function: Any) -> bool:
    """Whether a function of the class was replaced, before this pack looked, by one of another pack."""
    return str(getattr(function, "__module__", "")).startswith("comfy.")


def _replaced(now: list[nn.Module | None], before: list[nn.Module | None]) -> str:
    """In words, how the modules inside another have changed."""
    pairs = [(new, old) for new, old in zip(now, before, strict=False) if new is not old]
    if not pairs:
        return "other modules"
    new, old = (type(module).__name__ for module in pairs[0])
    return f"{new} in place of {old}"
