"""The host's `ModelPatcher` for an engine: it moves weights in another way, and translates patches in place of weights.

It is derived from the class of the running host: each release asks more of it, and what is new comes from there. All
patchers of an engine count as clones of each other, so the host has one entry for it in its list of models. Those of
MODEL share one `model` (native_model.py), those of CLIP another (native_clip.py).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from . import native_patches

if TYPE_CHECKING:
    import torch

    from ..vortex_core import Engine


@cache
def patcher_class() -> type:
    """`EnginePatcher`, made for the running host."""
    from comfy.model_patcher import ModelPatcher

    from . import engines  # which imports this

    class EnginePatcher(ModelPatcher):  # type: ignore[misc]
        """A MODEL that can be cloned, patched and sampled with. Merging and saving are refused.

        It moves all weights or none: every step needs all of them, so a part on the device is of no use. `handle`: the
        loader's, for which the engine is loaded again where it was unloaded. `hooked`: the host's hooks whose LoRAs
        count now, with their strengths.
        """

        def __init__(
            self, model: torch.nn.Module, load_device: Any, offload_device: Any, *args: Any, **options: Any
        ) -> None:
            self.hooked: tuple[Any, ...] = ()
            self.handle: Any = None
            super().__init__(model, load_device, offload_device, *args, **options)

        @property
        def engine(self) -> Engine:
            return self.model.vortex.engine  # type: ignore[no-any-return]

        def clone(self, *args: Any, **options: Any) -> Any:
            made = super().clone(*args, **options)
            made.handle = self.handle
            made.parent = self.parent or self  # the engine's own, which lives as long: the host falls back to it
            return made

        def is_clone(self, other: Any) -> bool:
            # MODEL and CLIP of an engine are one entry in the host's list, whose bytes count once
            stands = getattr(getattr(other, "model", None), "vortex", None)
            return stands is not None and stands.engine is self.engine

        def renew(self) -> None:
            """Load the engine again, if it was unloaded."""
            if self.handle is not None:
                engines.renew(self.handle)

        # -------------------------------------------------------- where the weights are

        def is_dynamic(self) -> bool:
            return False

        def model_size(self) -> int:
            # the size grows a little with each new picture size; while offloaded the last size counts
            self.model.vortex.size = self.engine.device_bytes or self.model.vortex.size
            return self.model.vortex.size  # type: ignore[no-any-return]

        def loaded_size(self) -> int:
            return self.engine.device_bytes

        def current_loaded_device(self) -> Any:
            return self.load_device if self.engine.resident else self.offload_device

        def load(self, *args: Any, **ignored: Any) -> None:
            try:
                with engines.torchs_own_memory_errors():
                    self.engine.resume()
                    self.model.vortex.install(self)
            except Exception:
                self.detach()  # as the host does: it does not list a model that was not loaded
                raise

        def partially_load(self, device_to: Any, extra_memory: int = 0, **ignored: Any) -> int:
            self.renew()
            before = self.engine.device_bytes
            with self.use_ejected(skip_and_inject_on_exit_only=True):
                self.unpatch_model()
                self.patch_model(load_weights=False)
                self.load()
            self.model.current_weight_patches_uuid = self.patches_uuid
            return self.engine.device_bytes - before

        def partially_unload(self, device_to: Any, memory_to_free: int = 0, **ignored: Any) -> int:
            return 0  # the host then calls detach, which frees all

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
            super().unpatch_model(None, unpatch_weights=False)  # no weight was patched, and none moves

        def detach(self, unpatch_all: bool = True) -> Any:
            # False: the host replaces an entry of its list, or this object dies; then nothing moves
            super().detach(unpatch_all)
            if unpatch_all:
                self.engine.offload()
            return self.model

        # -------------------------------------------------------- patches

        def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
            native_patches.check(patches, strength_model)
            return super().add_patches(patches, strength_patch, strength_model)

        def add_weight_wrapper(self, name: str, function: Any) -> NoReturn:
            raise native_patches.refused(name, "its weight would be computed anew for each product")

        def patch_hooks(self, hooks: Any) -> None:
            self.current_hooks = hooks
            several = () if hooks is None else tuple((hook.hook_ref, hook.strength) for hook in hooks.hooks)
            self.hooked = tuple(one for one in several if one[0] in self.hook_patches)
            self.model.vortex.install(self)

        def unpatch_hooks(self, whitelist_keys_set: Any = None) -> None:
            self.current_hooks, self.hooked = None, ()

        def hooked_patches(self) -> dict[str, list[Any]]:
            """The patches of the hooks that count now."""
            return self.get_combined_hook_patches(self.current_hooks) if self.hooked else {}

        # -------------------------------------------------------- what needs the weights themselves

        def get_key_patches(self, filter_prefix: str | None = None) -> NoReturn:
            raise native_patches.cannot_be("merged")

        def state_dict_for_saving(self, *parts: Any, **named: Any) -> NoReturn:
            raise native_patches.cannot_be("saved")

        model_state_dict_for_saving = state_dict_for_saving

        def patch_weight_to_device(self, key: str, *args: Any, **options: Any) -> NoReturn:
            raise native_patches.cannot_be("taken out one by one")

    return EnginePatcher
