"""The host's own Flux over an engine's weights: its code, `meta` weights, and two routes for a step.

The fast route is the engine's own step, replayed. It is taken where nothing reaches into the model. Else the host's
code runs, and each of its linears multiplies by the engine's weight, dequantized. The route is chosen below the host's
wrappers, in `_forward` (`forward` on hosts before 0.3.52), so that caches and wrappers of other packs work with both.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .native_patches import Translator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..vortex_core import Engine
    from ..vortex_core.flux1.conditioning import Conditioning
    from ..vortex_core.runtime.lending import Lent

log = logging.getLogger(__name__)

PROMPTS = 8  # whose conditionings are kept
NORMS = ("query_norm", "key_norm")
PIXELS = 8  # a side of a latent
Loras = tuple[tuple[Any, float], ...]


def build(engine: Engine) -> Any:
    """The host's model of an engine, on `meta`; its `vortex` is the `Weights`. Fails where the host has no Flux."""
    import comfy.model_detection
    import comfy.supported_models
    import torch

    from ..vortex_core.flux1.conditioning import Modulation
    from ..vortex_core.flux1.transformer import Transformer

    flux = engine.spec.flux
    with torch.device("meta"):
        shapes = {**Transformer(flux).state_dict(), **Modulation(flux).state_dict()}
    unet = comfy.model_detection.detect_unet_config(shapes, "")
    unet |= {"hidden_size": flux.hidden, "num_heads": flux.heads, "axes_dim": list(flux.axes), "theta": flux.theta}
    unet |= {"context_in_dim": flux.context, "vec_in_dim": flux.vec, "mlp_ratio": float(flux.mlp_ratio)}
    unet |= {"depth": flux.double_blocks, "depth_single_blocks": flux.single_blocks, "dtype": engine.dtype}
    config = comfy.supported_models.FluxSchnell(unet)
    weights = Weights(engine)
    config.custom_operations = operations(weights)
    model = config.get_model({}, device=torch.device("meta"))
    model.device = engine.device
    weights.attach(model)
    return model


def operations(weights: Weights) -> type:
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

        def forward(self, x: Tensor) -> Tensor:
            return weights.linear(self.canonical, x)

    return type("VortexOps", (comfy.ops.disable_weight_init,), {"Linear": Linear})


@dataclass(slots=True)
class Prompt:
    """What a step knows of a text, in host memory, with which LoRAs, and what the engine made of it."""

    txt: Tensor
    pooled: Tensor
    loras: Loras
    conditioning: Conditioning

    def fits(self, txt: Tensor, pooled: Tensor, loras: Loras) -> bool:
        """Whether it is the same text with the same LoRAs, by content."""
        import torch

        same = loras is self.loras or (
            [(id(file), strength) for file, strength in loras]
            == [(id(file), strength) for file, strength in self.loras]
        )
        return same and torch.equal(pooled, self.pooled) and torch.equal(txt, self.txt)


class Eager:
    """One step by the host's code. `table` `[B, rows, D]`: what the modulation linears answer; None: they compute."""

    def __init__(self, lent: Lent, rows: Mapping[str, slice], table: Tensor | None, inputs: Mapping[str, Tensor]) -> None:
        """`inputs`: what the embedders were given when `table` was made, by their names."""
        self.lent = lent
        self._rows, self._table, self._inputs = rows, table, inputs
        self._embedded: dict[str, Tensor] = {}
        self._vec: Tensor | None = None

    def linear(self, name: str, x: Tensor) -> Tensor:
        if name in self._rows and self._is_known(x):
            assert self._table is not None
            return self._table[:, self._rows[name]].reshape(*x.shape[:-1], -1)
        if name in self._inputs and not _equal(x, self._inputs[name]):
            self._table = None  # something changes time or text on the way: then it is really computed
        out = self.lent.linear(name, x)
        if name.endswith("out_layer"):
            self._embedded[name] = out
        return out

    def _is_known(self, x: Tensor) -> bool:
        """Whether `x` is what the table was made of."""
        import torch.nn.functional as F

        if self._table is None or len(self._embedded) < 2:
            return False
        if self._vec is None:
            time, text = self._embedded.values()
            self._vec = F.silu(time + text)
        return _equal(x.reshape(-1, x.shape[-1]), self._vec)


def _equal(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.dtype == b.dtype and torch.equal(a, b)


class Weights:
    """What stands behind the host's model: the engine, what it draws with now, and the route of each step."""

    def __init__(self, engine: Engine) -> None:
        from ..vortex_core.runtime.lending import modulation_rows

        self.engine = engine
        self.loras: Loras = ()
        self._translate = Translator(engine.spec)
        self._rows = modulation_rows(engine.spec.flux)
        self._prompts: list[Prompt] = []  # the latest first
        self._here = threading.local()
        self._installed: Any = None  # what `loras` were made of
        self._active: Callable[[], Any] = lambda: None
        self._told: tuple[Any, Any] = (None, None)

    # ------------------------------------------------------------ the host's modules

    def attach(self, model: Any) -> None:
        """Take the place of weights, and of the innermost forward, in the host's `model`."""
        import torch

        flux = model.diffusion_model
        for name, module in flux.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.canonical = name
            elif name.rpartition(".")[2] in NORMS:
                module.forward = partial(self._norm, module, name)
        self._model = weakref.ref(model)
        self._inner = "_forward" if hasattr(flux, "_forward") else "forward"
        self._original = getattr(type(flux), self._inner)
        self._signature = inspect.signature(self._original)
        self._forward_orig = type(flux).forward_orig
        self._modules = [(module, module.__dict__.get("forward")) for module in flux.modules() if module is not flux]
        self._classes = {type(module): type(module).forward for module, _ in self._modules}
        setattr(flux, self._inner, self._step)
        model.vortex = self
        model.memory_required = self._memory_required
        for module in (model, flux):  # `.to`, `.half`, `.cuda`: there are no weights to move
            module._apply = partial(_stay, module)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The product of a linear, inside a step or, for code that reaches past it, by itself."""
        eager = getattr(self._here, "eager", None)
        if eager is not None:
            return eager.linear(name, x)  # type: ignore[no-any-return]
        rows = x.numel() // x.shape[-1]
        return self._lend(lambda lent: lent.linear(name, x), 16, 16, rows, 0)

    def _norm(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        eager = getattr(self._here, "eager", None)
        if eager is None:
            rows = x.numel() // x.shape[-1]
            scale = self._lend(lambda lent: lent.norm(name).clone(), 16, 16, rows, 0)
        else:
            scale = eager.lent.norm(name)
        (kept,) = module._parameters
        parameters = module._parameters.copy()
        module._parameters[kept] = scale.to(x.device)  # type: ignore[assignment]
        try:
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        finally:
            module._parameters.update(parameters)

    def _lend(self, work: Callable[[Lent], Any], height: int, width: int, batch: int, tokens: int) -> Any:
        from . import engines

        with engines.torchs_own_memory_errors():
            return self.engine.lend(work, height, width, batch, tokens, self.loras)

    def _memory_required(self, input_shape: Any, cond_shapes: Any = None, **others: Any) -> int:
        """Bytes that the host should have free for a step, besides what the engine holds: as the plan says."""
        batch, _, height, width = (*input_shape[:2], *input_shape[-2:])
        return self.engine.working_bytes(*(_even(side) * PIXELS for side in (height, width)), batch)

    # ------------------------------------------------------------ whose patches

    def install(self, patcher: Any) -> None:
        """Draw for `patcher` from now on. Raises where its patches cannot be translated."""
        wanted = patcher.patches_uuid, patcher.hooked
        self._active = weakref.ref(patcher)
        if wanted != self._installed:
            patches = {key: list(several) for key, several in patcher.patches.items()}
            for key, several in patcher.hooked_patches().items():
                patches.setdefault(key, []).extend(several)
            self.loras = self._translate(patches)
            self._installed = wanted

    @property
    def active(self) -> Any:
        """The patcher that is drawn for, or None."""
        return self._active()

    # ------------------------------------------------------------ a step

    def _step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's innermost forward: `x [B, 16, H/8, W/8]` to the velocity."""
        bound = self._signature.bind(None, *args, **kwargs)
        given = dict(bound.arguments)
        given |= given.pop("kwargs", {})
        model, patcher = self._model(), self.active
        if patcher is not None:
            self.install(patcher)  # nothing where nothing changed
        why = self._declined(model.diffusion_model, given)
        options = given.get("transformer_options") or {}
        self._tell(options, why)
        x = given["x"]
        rows = self._conditionings(model, given) if self._has_texts(given) else None
        if why is None and rows is not None:
            return self._fast(x, rows)
        return self._eager(model.diffusion_model, args, kwargs, given, rows)

    def _declined(self, flux: nn.Module, given: Mapping[str, Any]) -> str | None:
        """Why the engine's own step cannot be taken, or None."""
        options = given.get("transformer_options") or {}
        for name in ("patches", "patches_replace"):
            there = sorted(kind for kind, what in (options.get(name) or {}).items() if what)
            if there:
                return f"{name} of {', '.join(map(str, there))}"
        for name in ("optimized_attention_override", "rope_options"):
            if options.get(name) is not None:
                return name
        control = given.get("control") or {}
        if any(one is not None for several in control.values() for one in several):
            return "a ControlNet"
        for name in ("ref_latents", "attention_mask"):
            if given.get(name) is not None:
                return name
        if not self._has_texts(given):
            return "inputs that are not those of FLUX.1-schnell"
        return self._changed(flux)

    def _changed(self, flux: nn.Module) -> str | None:
        """What of the host's modules is not as it was built, or None."""
        if getattr(flux.forward_orig, "__func__", None) is not self._forward_orig:
            return "another forward_orig"
        if type(flux).forward_orig is not self._forward_orig:
            return "another forward_orig of the host's class"
        for (module, forward), now in zip(self._modules, _below(flux), strict=False):
            if now is not module:
                return f"{type(now).__name__} in place of {type(module).__name__}"
            own = module.__dict__.get("forward")
            if own is not forward and getattr(own, "__func__", None) is not self._classes[type(module)]:
                return f"another forward of {type(module).__name__}"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"hooks of {type(module).__name__}"
        changed = [kind for kind, forward in self._classes.items() if kind.forward is not forward]
        return f"another forward of the class {changed[0].__name__}" if changed else None

    def _has_texts(self, given: Mapping[str, Any]) -> bool:
        """Whether the inputs are those that an engine draws from."""
        flux, x, txt, pooled = self.engine.spec.flux, given["x"], given.get("context"), given.get("y")
        return (
            x.ndim == 4
            and x.shape[1] == flux.latent_channels
            and txt is not None
            and txt.ndim == 3
            and (len(txt), txt.shape[2]) == (len(x), flux.context)
            and (pooled is None or (pooled.ndim == 2 and len(pooled) == len(x) and pooled.shape[1] >= flux.vec))
            and given["timestep"].shape == (len(x),)
        )

    def _tell(self, options: Mapping[str, Any], why: str | None) -> None:
        """Log the route, once a sampling and when it changes."""
        sampling = options.get("sample_sigmas")
        if (sampling is not self._told[0]) or (why != self._told[1]):
            self._told = sampling, why
            log.info("Steps are %s", "the engine's own" if why is None else f"the host's code, because of {why}")

    # ------------------------------------------------------------ texts

    def _conditionings(self, model: Any, given: Mapping[str, Any]) -> list[tuple[float, Conditioning]] | None:
        """The timestep and the conditioning of each row; None where a timestep is none of a flow's."""
        import torch

        times = given["timestep"].tolist()
        if not all(0 <= t <= 1 for t in times):
            return None
        flux, dtype = self.engine.spec.flux, self.engine.dtype
        texts = given["context"].to("cpu", dtype)
        pooled = given.get("y")
        vectors = (
            torch.zeros(len(texts), flux.vec, dtype=dtype)
            if pooled is None
            else pooled[:, : flux.vec].to("cpu", dtype)
        )
        schedule = self._schedule(model, given)
        return [
            (t, self._conditioning(texts[i : i + 1], vectors[i : i + 1], t, schedule)) for i, t in enumerate(times)
        ]

    def _schedule(self, model: Any, given: Mapping[str, Any]) -> list[float]:
        """The timesteps of the whole sampling, as the host gives them."""
        sigmas = (given.get("transformer_options") or {}).get("sample_sigmas")
        if sigmas is None:
            return []
        times = model.model_sampling.timestep(sigmas.cpu()).float().tolist()
        return [t for t in times[:-1] if 0 <= t <= 1]

    def _conditioning(self, txt: Tensor, pooled: Tensor, t: float, schedule: list[float]) -> Conditioning:
        from . import engines

        found = next((known for known in self._prompts if known.fits(txt, pooled, self.loras)), None)
        with engines.torchs_own_memory_errors():
            if found is None:
                wanted = tuple(dict.fromkeys([*schedule, t]))
                made = self.engine.condition(txt, pooled, loras=self.loras, sigmas=wanted)
                found = Prompt(txt.clone(), pooled.clone(), self.loras, made)
            else:
                self._prompts.remove(found)
                if t not in found.conditioning.sigmas:
                    several = tuple(dict.fromkeys([*schedule, t]))
                    found.conditioning = self.engine.schedule(found.conditioning, several)
        self._prompts.insert(0, found)
        del self._prompts[PROMPTS:]
        return found.conditioning

    # ------------------------------------------------------------ the routes

    def _fast(self, x: Tensor, rows: list[tuple[float, Conditioning]]) -> Tensor:
        """The engine's own step, for rows of one time and text together."""
        import comfy.ldm.common_dit
        import torch

        from . import engines

        height, width = x.shape[-2:]
        latents = comfy.ldm.common_dit.pad_to_patch_size(x, (2, 2))
        out = torch.empty(latents.shape, dtype=torch.float32, device=x.device)
        left = list(range(len(rows)))
        while left:
            t, conditioning = rows[left[0]]
            group = [i for i in left if rows[i][0] == t and rows[i][1] is conditioning]
            left = [i for i in left if i not in group]
            with engines.torchs_own_memory_errors():
                out[group] = self.engine.velocity(latents[group], t, conditioning, self.loras).to(x.device)
        return out[..., :height, :width]

    def _eager(
        self,
        flux: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Mapping[str, Any],
        rows: list[tuple[float, Conditioning]] | None,
    ) -> Tensor:
        """The host's code over the engine's weights."""
        x, txt = given["x"], given.get("context")
        references = given.get("ref_latents") or []
        tokens = (0 if txt is None else txt.shape[1]) + sum(math.prod(one.shape[-2:]) // 4 for one in references)

        def work(lent: Lent) -> Tensor:
            table = None if rows is None else self._table(rows, x)
            self._here.eager = Eager(lent, self._rows, table, {} if table is None else self._inputs(given))
            try:
                return self._original(flux, *args, **kwargs)  # type: ignore[no-any-return]
            finally:
                self._here.eager = None

        height, width = (_even(side) * PIXELS for side in x.shape[-2:])
        return self._lend(work, height, width, len(x), tokens)  # type: ignore[no-any-return]

    def _table(self, rows: list[tuple[float, Conditioning]], x: Tensor) -> Tensor:
        import torch

        tables = [conditioning.modulation[conditioning.sigmas.index(t)] for t, conditioning in rows]
        return torch.stack(tables).to(x.device, x.dtype)

    def _inputs(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the host's code gives to the embedders of time and text, as it comes from outside."""
        from comfy.ldm.flux.layers import timestep_embedding

        x, pooled = given["x"], given.get("y")
        inputs = {"time_in.in_layer": timestep_embedding(given["timestep"], 256).to(x.dtype)}
        if pooled is not None:
            inputs["vector_in.in_layer"] = pooled[:, : self.engine.spec.flux.vec]
        return inputs


def _even(side: int) -> int:
    return side + side % 2


def _below(flux: nn.Module) -> Iterator[nn.Module]:
    modules = flux.modules()
    next(modules)
    return modules


def _stay(module: Any, *ignored: Any, **options: Any) -> Any:
    return module
