"""A small stand-in for ComfyUI: the modules that nodes/host.py imports, with what it asks of them."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import workflow_format

PACK = workflow_format.load_pack()


def module(name: str) -> Any:
    """A module of the pack, as ComfyUI imported it."""
    return importlib.import_module(f"{workflow_format.PACKAGE}.{name}")


def node(key: str) -> Any:
    return PACK.NODE_CLASS_MAPPINGS[key]()


class Interrupted(BaseException):
    """As the host's own: not an `Exception`, so that a broad `except` is found out."""


class ModelPatcher:
    """The host's, as far as the pack builds on it."""

    def __init__(self, model: torch.nn.Module, load_device: Any, offload_device: Any, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.patches: dict[str, list[Any]] = {}
        self.patches_uuid, self.parent = object(), None

    def use_ejected(self, **options: Any) -> Any:
        return nullcontext()

    def patch_model(self, **options: Any) -> torch.nn.Module:
        return self.model

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None: ...

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        return self.model


class VAE:
    """The host's, which is told from others by its class."""


class Bar:
    """The host's progress bar, remembered."""

    def __init__(self, host: FakeHost, total: int) -> None:
        self.host = host
        host.progress.append([])

    def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
        self.host.progress[-1].append((value, total, preview))


class Flux:
    """Flux's latent scale, as the host has it."""

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / 0.3611 + 0.1159

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - 0.1159) * 0.3611


class FakeHost:
    """What a test sets, and what the pack did. `interrupt_after` counts the checks before the user interrupts."""

    def __init__(self, base: Path) -> None:
        models = base / "models"
        self.models, self.comfy = models, base / "comfy"
        kinds = ("diffusers", "diffusion_models", "checkpoints", "text_encoders", "vae")
        self.folders = {kind: [str(models / kind)] for kind in kinds}
        self.folders["diffusion_models"].insert(0, str(models / "unet"))
        self.folders["text_encoders"].append(str(models / "clip"))
        self.previewer: Any = None
        self.reset()

    def reset(self) -> None:
        self.progress: list[list[Any]] = []
        self.asked: list[tuple[Any, int]] = []
        self.interrupt_after: int | None = None
        self.running = 0
        self.previewer = None

    def check(self) -> None:
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after < 0:
                raise Interrupted

    def load_models_gpu(self, patchers: list[Any], memory_required: int = 0) -> None:
        for patcher in patchers:
            self.asked.append((patcher, memory_required))
            patcher.partially_load(patcher.load_device, 0)

    def add_folder(self, kind: str, path: str) -> None:
        if path not in self.folders.setdefault(kind, []):
            self.folders[kind].append(path)

    def is_running(self) -> dict[int, int]:
        self.running -= 1
        return {0: 0} if self.running > 0 else {}

    def modules(self) -> dict[str, ModuleType]:
        """By name, for `sys.modules`."""
        contents: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device("cpu"),
                "intermediate_device": lambda: torch.device("cpu"),
                "free_memory": lambda size, device: None,
                "load_models_gpu": self.load_models_gpu,
                "throw_exception_if_processing_interrupted": self.check,
                "__file__": str(self.comfy / "model_management.py"),
            },
            "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.sd": {"VAE": VAE},
            "comfy.utils": {"ProgressBar": lambda total: Bar(self, total)},
            "comfy.latent_formats": {"Flux": Flux},
            "latent_preview": {"get_previewer": lambda device, latent_format: self.previewer},
            "folder_paths": {
                "models_dir": str(self.models),
                "add_model_folder_path": self.add_folder,
                "get_folder_paths": lambda kind: self.folders.get(kind, []),
            },
            "server": {
                "PromptServer": SimpleNamespace(
                    instance=SimpleNamespace(prompt_queue=_Queue(self))
                )
            },
        }  # fmt: skip
        made = {}
        for name, content in contents.items():
            made[name] = ModuleType(name)
            made[name].__dict__.update(content)
            if "." in name:  # `import comfy.utils as x` reads the attribute of its parent
                setattr(made["comfy"], name.partition(".")[2], made[name])
        return made


class _Queue:
    def __init__(self, host: FakeHost) -> None:
        self.host = host

    @property
    def currently_running(self) -> dict[int, int]:
        return self.host.is_running()
