"""What stands behind the host's text encoders: the engine's, with the LoRAs of the CLIP that was loaded last."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..vortex_core.errors import VortexInputError, quoted
from .native_patches import Translator

if TYPE_CHECKING:
    from torch import Tensor

    from ..vortex_core import Engine
    from ..vortex_core.flux1.embeddings import Embeddings
    from .native_prompts import Loras
    from .native_steps import Steps

Tokens = list[list[Any]]  # texts, or chunks of one, as the host gives them


class Texts:
    """The text encoders of an engine, as `Steps` are its transformer."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._translate = Translator(steps.engine.spec)
        self._active: Callable[[], Any] = lambda: None
        self._installed: Any = None  # what `_loras` were made of
        self._loras: Loras = ()

    @property
    def engine(self) -> Engine:
        return self._steps.engine

    @property
    def size(self) -> int:
        """Bytes of the engine when it was last on its device."""
        return self._steps.size

    @size.setter
    def size(self, nbytes: int) -> None:
        self._steps.size = nbytes

    def install(self, patcher: Any) -> None:
        """Read texts for `patcher` from now on. Raises `VortexError` where its patches cannot be translated."""
        self._active = weakref.ref(patcher)
        wanted = patcher.patches_uuid, patcher.hooked
        if wanted != self._installed:
            patches = {key: list(several) for key, several in patcher.patches.items()}
            for key, several in patcher.hooked_patches().items():
                patches.setdefault(key, []).extend(several)
            self._loras, self._installed = self._translate(patches), wanted

    def embed(self, layer: int | None, **texts: list[list[int]]) -> Embeddings:
        """See `Engine.embed`."""
        from . import engines

        patcher = self._active()
        if patcher is not None:
            self.install(patcher)  # nothing where nothing changed
        with engines.torchs_own_memory_errors():
            return self.engine.embed(**texts, layer=layer, loras=self._loras)

    def memory_required(self, tokens: Any, device: Any = None) -> int:
        """Bytes that the host should have free to read a text, besides the engine's own."""
        patcher = self._active()
        if patcher is not None:
            patcher.renew()
        longest = max((len(text) for text in tokens.get("t5xxl", ())), default=0) if isinstance(tokens, dict) else 0
        if not self.engine.loaded:
            return 0  # loading makes room for the budget
        return max(0, self.engine.embed_peak_bytes(longest) - max(self.size, self.engine.device_bytes))


def t5_states(texts: Texts, encoder: Any, tokens: Tokens) -> tuple[Tensor, None]:
    """What the host's T5 makes of `tokens`: states `[T, N, context]` in fp32, and no pooled vector."""
    return texts.embed(layer_of(encoder), t5=plain(tokens)).txt.float(), None


def clip_states(texts: Texts, encoder: Any, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """What the host's CLIP makes of `tokens`: states `[C, 77, vec]` and the pooled vectors `[C, vec]`, in fp32."""
    found = texts.embed(layer_of(encoder), clip=plain(tokens))
    return found.states.float(), found.pooled.float()


def layer_of(encoder: Any) -> int | None:
    """The layer that CLIP Set Last Layer chose, as the host keeps it in its encoder; None for the last."""
    if encoder.layer == "last":
        return None
    if encoder.layer != "hidden":
        raise VortexInputError(
            f"The CLIP of NF4 Flux Loader gives the states of one layer, not of {quoted(encoder.layer)}."
        )
    return int(encoder.layer_idx)


def plain(tokens: Tokens) -> list[list[int]]:
    """Token ids. Raises `VortexInputError` for what is none, which is in place of words."""
    for text in tokens:
        strange = next((token for token in text if not isinstance(token, Integral)), None)
        if strange is not None:
            raise VortexInputError(
                "The CLIP of NF4 Flux Loader reads words alone: textual inversions (embedding:name) and pictures are "
                "vectors in place of words. Take them out of the prompt, or use DualCLIPLoader."
            )
    return [[int(token) for token in text] for text in tokens]
