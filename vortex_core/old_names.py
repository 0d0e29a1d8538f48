"""Modules under the names that they had before 0.2.0: `vortex_core.vram` is `vortex_core.device.vram`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOMS = {  # the modules of each: NAME, or NEW=OLD
    "utils": "bounds numeric packages paths whole_files=disk temporary_files=partial lock=checkpoint.lock "
    "printable=foreign timeline timing=latency",
    "device": "streams worker jobs nvml vram cpu_threads=threads finite_pictures=finite",
    "memory": "arena planner offload=residency weights=placement host_memory",
    "kernels": "decoder_attention=kernels.attention dequantize=kernels.decode "
    "fp8_attention=kernels.heads scaled_tensor=kernels.operand tiles=kernels.tile",
    "quant": "linear",
    "storage": "files=checkpoint.files filebytes=checkpoint.filebytes headers=checkpoint.headers "
    "refused_formats=checkpoint.formats dtypes=checkpoint.dtypes finite_weights=checkpoint.finite "
    "tensors=checkpoint.tensors upload=checkpoint.upload checksum=checkpoint.checksum "
    "materialize=checkpoint.materialize vocabulary=checkpoint.vocabulary",
    "flux1": "spec transformer step_buffers=step conditioning text_encoders=text vae decoder_memory=strips "
    "sampling request",
    "checkpoint": "dialects=checkpoint.dialect key_maps=checkpoint.layout cache_entry=checkpoint.entry "
    "cached_tensors=checkpoint.kept identity=checkpoint.source quantize",
    "runtime": "engine turns painter loading model graphs",
    "bench": "contest=bench.compare rank_tests=bench.comparison revisions=bench.against revision_worker=bench.worker "
    "plot_style=bench.figures samples=bench.pictures readings=bench.memory",
    "cli": "compare=bench.compare_command terminal console interrupt=cancel doctor inspection plan_report=proposal "
    "pictures png bench=bench.command baseline=bench.baseline_command bench_options=bench.options "
    "bench_output=bench.output",
}
NAMES = [(room, *item.partition("=")[::2]) for room, items in ROOMS.items() for item in items.split()]
MOVED = {old or new: f"{room}.{new}" for room, new, old in NAMES}


class Moved(MetaPathFinder, Loader):
    """Imports the old names of a package's modules: each is the module at its new name."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        package, _, name = fullname.partition(f"{self.package}.")
        return ModuleSpec(fullname, self) if not package and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at the new name, so that both names are the same object."""
        module = import_module(f"{self.package}.{MOVED[spec.name.removeprefix(f'{self.package}.')]}")
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run already. Restore its `__spec__`, which the import system has overwritten."""
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = self.specs.pop(spec.name)


def install(package: str) -> None:
    """Have the old names of `package` found, after every other finder. They stay until the process ends."""
    if not any(isinstance(finder, Moved) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.append(Moved(package))


def attributes_of(package: str, module: str, *names: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package that replaced a module of its name: `names` of that module are now in `module`."""

    def attribute(name: str) -> Any:
        if name not in names:  # also for a submodule, which is imported after this fails
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(module, package), name)

    return attribute
