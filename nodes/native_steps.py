"""The innermost forward of the host's Flux: by the engine's own step where that can be, else by the host's code.

It is below the host's wrappers, so caches and wrappers of other packs work with both.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .native_eager import Eager, inputs_of, table_of
from .native_nag import is_wanted, wish_of
from .native_patches import Translator
from .native_prompts import Loras, Prompts, Row, schedule_of
from .native_route import Call, Original, pixels

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..vortex_core import Engine
    from ..vortex_core.runtime.lending import Lent

log = logging.getLogger(__name__)

LEAST = 16  # pixels; a side of the picture whose memory is planned where only a single product is asked for


def refused_nag(why: str | None) -> Exception:
    """The error for a step that Vortex NAG is asked of, and that the host's code has to take."""
    from ..vortex_core.errors import VortexInputError

    return VortexInputError(
        f"Vortex NAG works in Vortex's own steps only, and these are ComfyUI's code, because of {why}. Remove one of "
        "both, or use ComfyUI's Normalized Attention Guidance with a negative prompt in KSampler."
    )


class Steps:
    """What stands behind the host's model: the engine, the LoRAs that it draws with now, and the route of each step.

    `size`: bytes of the engine when it was last on its device. `texts`: the host's text encoders, while a CLIP lives.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.size = engine.device_bytes
        self.loras: Loras = ()
        self.texts: Callable[[], Any] = lambda: None
        self._prompts = Prompts()
        self._here = threading.local()
        self._translate: Translator | None = None
        self._installed: Any = None  # what `loras` were made of
        self._active: Callable[[], Any] = lambda: None
        self._told: tuple[Any, Any] = (None, None)

    def attach(self, model: Any) -> None:
        """Stand behind the innermost forward of the host's `model`."""
        import torch

        from ..vortex_core.runtime.lending import modulation_rows

        flux = model.diffusion_model
        self._model, self._flux = weakref.ref(model), weakref.ref(flux)
        self._original = Original(flux)
        self._rows = modulation_rows(self.engine.spec.flux)
        self._translate = Translator(self.engine.spec)
        setattr(flux, self._original.name, torch.compiler.disable(self._step))

    def renew(self, engine: Engine) -> None:
        """Go on with another engine of the same weights: the one before was unloaded."""
        self.engine, self._installed = engine, None
        self._prompts.forget()

    # ------------------------------------------------------------ single products

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x` `[..., K]` times a linear: inside a step, or by itself for code that reaches past it."""
        eager = getattr(self._here, "eager", None)
        if eager is not None:
            return eager.linear(name, x)  # type: ignore[no-any-return]
        return self._lend(lambda lent: lent.linear(name, x), LEAST, LEAST, x.numel() // x.shape[-1], 0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The scale of a norm, where `x` is: inside a step or by itself."""
        eager = getattr(self._here, "eager", None)
        if eager is None:
            return self._lend(lambda lent: lent.norm(name).clone(), LEAST, LEAST, 1, 0).to(x.device)
        return eager.lent.norm(name).to(x.device)  # type: ignore[no-any-return]

    def _lend(self, work: Callable[[Lent], Tensor], height: int, width: int, batch: int, tokens: int) -> Tensor:
        from . import engines

        with engines.torchs_own_memory_errors():
            return self.engine.lend(work, height, width, batch, tokens, self.loras)

    def memory_required(self, input_shape: Any, cond_shapes: Any = None, **others: Any) -> int:
        """Bytes that the host should have free for a step besides the engine's own, as the plan has them."""
        patcher = self.active
        if patcher is not None:
            patcher.renew()
        batch, (height, width) = input_shape[0], input_shape[-2:]
        peak = self.engine.peak_bytes(16 * -(-height // 2), 16 * -(-width // 2), batch)
        return max(0, peak - max(self.size, self.engine.device_bytes))

    # ------------------------------------------------------------ whose patches

    @property
    def active(self) -> Any:
        """The patcher that is drawn for, or None."""
        return self._active()

    def install(self, patcher: Any) -> None:
        """Draw for `patcher` from now on. Raises `VortexError` where its patches cannot be translated."""
        wanted = patcher.patches_uuid, patcher.hooked
        if wanted != self._installed and self._translate is not None:
            patches = {key: list(several) for key, several in patcher.patches.items()}
            for key, several in patcher.hooked_patches().items():
                patches.setdefault(key, []).extend(several)
            self.loras = self._translate(patches)
            self._installed = wanted
        self._active = weakref.ref(patcher)

    # ------------------------------------------------------------ a step

    def _step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The host's innermost forward: `x [B, 16, H/8, W/8]` to the velocity."""
        model, patcher, call = self._model(), self.active, self._original.call(args, kwargs)
        if patcher is not None:
            self.install(patcher)  # nothing where nothing changed
        flux, spec = self._flux(), self.engine.spec.flux  # not the host's attribute: that may be a compiled one now
        why = self._original.declined(flux, call, spec)
        rows = None
        if call.suits(spec):
            rows = self._guarded(lambda: self._prompts.rows(self.engine, call, schedule_of(model, call), self.loras))
            why = why or ("timesteps that are not from 0 to 1" if rows is None else None)
        self._tell(call.options, why)
        if why is None and rows is not None:
            return self._fast(call, rows, schedule_of(model, call))
        if wish_of(call.options) is not None:
            raise refused_nag(why)
        return self._eager(flux, call, rows)

    def _tell(self, options: Mapping[str, Any], why: str | None) -> None:
        """Log the route, once a sampling and when it changes."""
        sampling = options.get("sample_sigmas")
        if (sampling is not self._told[0]) or (why != self._told[1]):
            self._told = sampling, why
            log.info("MODEL: steps are %s", "Vortex's own" if why is None else f"ComfyUI's code, because of {why}")

    def _guarded(self, work: Callable[[], Any]) -> Any:
        from . import engines

        with engines.torchs_own_memory_errors():
            return work()

    def _fast(self, call: Call, rows: list[Row], schedule: list[float]) -> Tensor:
        """The engine's own step, for rows of one time, text and guidance together."""
        import comfy.ldm.common_dit
        import torch

        x, wish = call.x, wish_of(call.options)
        height, width = x.shape[-2:]
        latents = comfy.ldm.common_dit.pad_to_patch_size(x, (2, 2))
        out = torch.empty(latents.shape, dtype=torch.float32, device=x.device)
        led = [wish is not None and is_wanted(call.options, i, len(rows)) for i in range(len(rows))]
        left = list(range(len(rows)))
        while left:
            t, conditioning = rows[left[0]]
            alike = (t, id(conditioning), led[left[0]])
            group = [i for i in left if (rows[i][0], id(rows[i][1]), led[i]) == alike]
            left = [i for i in left if i not in group]
            some = latents if len(group) == len(latents) else latents[group]

            def step() -> Tensor:
                away: dict[str, Any] = {}
                if wish is not None and alike[2]:  # noqa: B023
                    text = self._prompts.of(self.engine, (wish.txt, wish.pooled), t, schedule, self.loras)  # noqa: B023
                    away = {"negative": text, "nag": wish.nag}
                return self.engine.velocity(some, t, conditioning, self.loras, **away)  # noqa: B023

            out[group] = self._guarded(step).to(x.device)
        return out[..., :height, :width]

    def _eager(self, flux: nn.Module, call: Call, rows: list[Row] | None) -> Tensor:
        """The host's code over the engine's weights."""
        x, txt = call.x, call.given.get("context")
        references = call.given.get("ref_latents") or []
        tokens = (0 if txt is None else txt.shape[1]) + sum(math.prod(one.shape[-2:]) // 4 for one in references)

        def work(lent: Lent) -> Tensor:
            table = None if rows is None else table_of(rows, x)
            inputs = {} if table is None else inputs_of(call, self.engine.spec.flux)
            outer = getattr(self._here, "eager", None)
            self._here.eager = Eager(lent, self._rows, table, inputs)
            try:
                return self._original.forward(flux, *call.args, **call.kwargs)
            finally:
                self._here.eager = outer

        return self._lend(work, *pixels(x), len(x), tokens)
