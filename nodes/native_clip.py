"""The host's CLIP over an engine's text encoders: its classes, with weights on `meta` and states by the engine."""

from __future__ import annotations

import logging
import weakref
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

from ..vortex_core.errors import VortexInputError
from . import native_patcher
from .native_model import stay
from .native_texts import Texts, clip_states, t5_states
from .native_tokens import tokenizer_of

if TYPE_CHECKING:
    from ..vortex_core import Engine
    from .native_steps import Steps
    from .types import Model

log = logging.getLogger(__name__)


def clip_of(base: Any, handle: Model) -> Any:
    """The CLIP of an engine whose patcher is `base`; None where the host's text encoders are not what Vortex knows.

    All CLIPs of an engine share one `cond_stage_model`. `handle`: the loader's.
    """
    try:
        made = _kind()(no_init=True)
        made.tokenizer = tokenizer_of(base.engine)
        steps = base.model.vortex
        texts = steps.texts() or _encoders(base.engine, steps, made.tokenizer.clip_l)
        steps.texts = weakref.ref(texts)  # weak, as is all that leads back: they go with their last CLIP
    except Exception as error:
        log.warning("No CLIP here: this ComfyUI's text encoders are not what Vortex knows (%r)", error)
        return None
    made.cond_stage_model = texts
    made.patcher = _patcher_kind()(texts, base.load_device, base.offload_device, size=base.model_size())
    made.patcher.handle, made.patcher.parent = handle, base  # which lives as long as the engine
    made.patcher.hook_mode, made.patcher.is_clip = _least_memory(), True
    made.layer_idx = made.apply_hooks_to_conds = None
    made.use_clip_schedule, made.tokenizer_options = False, {}
    return made


def _encoders(engine: Engine, steps: Steps, words: Any) -> Any:
    """The host's text encoders of Flux in an engine's sizes, on `meta`; their `vortex` is the `Texts`.

    `words`: the host's tokenizer of CLIP. T5's special tokens are the same in every vocabulary.
    """
    import torch
    from comfy.text_encoders.flux import FluxClipModel

    clip, t5 = engine.spec.clip, engine.spec.t5
    sizes: dict[str, Any] = {
        "clip_l_model_config": {
            "hidden_size": clip.hidden_size, "intermediate_size": clip.intermediate_size,
            "num_hidden_layers": clip.num_hidden_layers, "num_attention_heads": clip.num_attention_heads,
            "max_position_embeddings": clip.max_position_embeddings, "vocab_size": clip.vocab_size,
        },
        "t5xxl_model_config": {
            "d_model": t5.d_model, "d_ff": t5.d_ff, "d_kv": t5.d_kv, "num_heads": t5.num_heads,
            "num_layers": t5.num_layers, "vocab_size": t5.vocab_size,
        },
    }  # fmt: skip
    made = FluxClipModel(engine.dtype, torch.device("meta"), engine.dtype, sizes)
    made.clip_l.special_tokens = {"start": words.start_token, "end": words.end_token, "pad": words.pad_token}
    texts = Texts(steps)
    made.clip_l.forward = partial(clip_states, texts, made.clip_l)
    made.t5xxl.forward = partial(t5_states, texts, made.t5xxl)
    made.vortex = texts
    made.memory_estimation_function = texts.memory_required
    for module in made.modules():  # `.to`, `.half`, `.cuda`: there are no weights to move
        module._apply = partial(stay, weakref.ref(module))
    return made


def _least_memory() -> Any:
    import comfy.hooks

    return comfy.hooks.EnumHookMode.MinVram


@cache
def _kind() -> type:
    from comfy.sd import CLIP

    class VortexCLIP(CLIP):  # type: ignore[misc]
        """The host's CLIP. Merging and saving are refused."""

        def clone(self, *args: Any, **options: Any) -> Any:
            made = super().clone(*args, **options)
            made.__class__ = type(self)
            return made

        def get_sd(self, *args: Any, **options: Any) -> NoReturn:
            raise cannot_be("saved")

        state_dict_for_saving = get_sd

        def load_sd(self, *args: Any, **options: Any) -> NoReturn:
            raise cannot_be("given other weights")

    return VortexCLIP


@cache
def _patcher_kind() -> type:
    class TextsPatcher(native_patcher.patcher_class()):  # type: ignore[misc]
        """A CLIP's patcher: the engine's, whose LoRAs count while a text is read."""

        def load(self, *args: Any, **options: Any) -> None:
            super().load()
            self.apply_hooks(self.forced_hooks, force_apply=True)

        def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
            if strength_model != 1.0 or any(isinstance(what, list) for what in patches.values()):
                raise cannot_be("merged")
            return super().add_patches(patches, strength_patch, strength_model)

        def get_key_patches(self, filter_prefix: str | None = None) -> NoReturn:
            raise cannot_be("merged")

        def state_dict_for_saving(self, *parts: Any, **named: Any) -> NoReturn:
            raise cannot_be("saved")

        model_state_dict_for_saving = state_dict_for_saving

        def patch_weight_to_device(self, key: str, *args: Any, **options: Any) -> NoReturn:
            raise cannot_be("taken out one by one")

    return TextsPatcher


def cannot_be(what: str) -> VortexInputError:
    """The error for what needs the weights themselves; `what`: "merged"."""
    return VortexInputError(
        f"The CLIP of NF4 Flux Loader cannot be {what}: its weights are in 4 bits, in Vortex's engine. Use "
        "DualCLIPLoader with files in 16 bits."
    )
