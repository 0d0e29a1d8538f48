"""Every call into ComfyUI: folders, VRAM, progress, previews, interrupts.

All imports of ComfyUI are inside functions: the pack loads fast, and its nodes can be tested without ComfyUI.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..vortex_core import Engine

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- folders


_registered_with: Any = None


def model_folders(kind: str) -> list[Path]:
    """The host's registered folders of one kind, such as `checkpoints`; none for an unknown kind.

    `vortex` is registered here: once, because some hosts do much work each time, and again if the host forgot it.
    """
    global _registered_with
    import folder_paths

    if _registered_with is not folder_paths or (kind == "vortex" and not _folders(kind)):
        folder_paths.add_model_folder_path("vortex", os.path.join(folder_paths.models_dir, "vortex"))
        _registered_with = folder_paths
    return _folders(kind)


def _folders(kind: str) -> list[Path]:
    import folder_paths

    try:
        return list(dict.fromkeys(Path(folder) for folder in folder_paths.get_folder_paths(kind)))
    except KeyError:
        return []


def cache_folder() -> Path:
    """Where quantized weights are kept, unless `$VORTEX_CACHE` names another place."""
    return model_folders("vortex")[0] / "cache"


def cache_dir() -> Path | None:
    """The argument `cache_dir` of `Engine.load`: None if `$VORTEX_CACHE` is set, which the engine then reads."""
    return None if os.environ.get("VORTEX_CACHE") else cache_folder()


def tokenizers() -> tuple[Path, Path]:
    """The host's own copies of CLIP's and T5's tokenizers."""
    import comfy.model_management as management

    root = Path(management.__file__).parent
    return root / "sd1_tokenizer", root / "text_encoders" / "t5_tokenizer"


# ---------------------------------------------------------------- VRAM


def device() -> torch.device:
    """The device the host computes on."""
    import comfy.model_management as management

    return management.get_torch_device()


def intermediate_device() -> torch.device:
    """The device that results lie on between nodes: the CPU, unless the user asked for another."""
    import comfy.model_management as management

    return management.intermediate_device()


def intermediate_dtype() -> torch.dtype:
    """The type of pictures and latents between nodes."""
    import comfy.model_management as management
    import torch

    kind = getattr(management, "intermediate_dtype", None)  # since 2026; before, it is fp32
    return torch.float32 if kind is None else kind()


def make_room(size: int, device: torch.device) -> None:
    """Have the host move its models off the GPU until `size` bytes are free."""
    import comfy.model_management as management

    if device.type != "cpu":
        management.free_memory(size, device)


def register(engine: Engine, model: torch.nn.Module | None = None) -> Any:
    """The stand-in for an engine in the host's list of loaded models. Keep it: the host holds it weakly.

    `model`: the host's, of an engine of the same weights that was unloaded.
    """
    import torch

    from . import native_model, native_patcher

    if model is None:
        model = native_model.model_of(engine)
    else:
        model.vortex.renew(engine)  # type: ignore[union-attr, operator]
    return native_patcher.patcher_class()(model, engine.device, torch.device("cpu"), size=engine.device_bytes)


def bring_back(patcher: Any, working: int) -> None:
    """Make an engine resident, as the host makes its own models resident, with `working` bytes free beside it."""
    import comfy.model_management as management

    management.load_models_gpu([patcher], memory_required=working)


# ---------------------------------------------------------------- progress, previews, interrupts


def progress(total: int) -> Callable[..., None]:
    """A function `report(done, preview=None)` for the running node's bar. It raises when the user interrupts."""
    bar = None
    with _only_shown("progress"):
        import comfy.utils

        bar = comfy.utils.ProgressBar(total)

    def report(done: int, preview: Any = None) -> None:
        with _only_shown("progress"):
            if bar is not None:
                bar.update_absolute(done, total, preview)
        check_interrupt()

    return report


def check_interrupt() -> None:
    """Raise the host's exception if the user has interrupted."""
    import comfy.model_management as management

    management.throw_exception_if_processing_interrupted()


def previewer(device: torch.device) -> Callable[[Tensor], Any] | None:
    """A function from latents in the model's scale to a preview, as the user chose; None if previews are off."""
    found = None
    with _only_shown("previews"):
        import comfy.latent_formats
        import latent_preview

        found = latent_preview.get_previewer(device, comfy.latent_formats.Flux())

    def preview(latents: Tensor) -> Any:
        with _only_shown("previews"):
            return found.decode_latent_to_preview_image("JPEG", latents)
        return None

    return preview if found else None


@contextmanager
def _only_shown(what: str) -> Iterator[None]:
    """Turn an error in the host's display into one line of the log: the picture goes on."""
    import comfy.model_management as management

    try:
        yield
    except getattr(management, "InterruptProcessingException", ()):  # the host's bar raises it, too
        raise
    except Exception as error:
        _say_once(f"No {what} here: ComfyUI's way to show them is another ({error!r})")


@cache
def _say_once(line: str) -> None:
    log.warning(line)


def is_running() -> bool:
    """Whether the host is running a prompt."""
    from server import PromptServer

    return bool(PromptServer.instance.prompt_queue.currently_running)


# ---------------------------------------------------------------- latents


def to_native(latents: Tensor) -> Tensor:
    """From the model's scale to that of the host's LATENT: a copy on the CPU."""
    import comfy.latent_formats

    return comfy.latent_formats.Flux().process_out(latents.float()).to("cpu", copy=True)


def from_native(samples: Tensor) -> Tensor:
    """From the scale of the host's LATENT to the model's."""
    import comfy.latent_formats

    return comfy.latent_formats.Flux().process_in(samples.float())
