"""An engine with FLUX.1-schnell's sizes and random weights that were never in a file: it loads in seconds."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vortex_core import Engine
from vortex_core.checkpoint.bundle import Bundle, open_bundle
from vortex_core.flux1.spec import ModelSpec
from vortex_core.nf4 import BLOCK, NF4Weight
from vortex_core.runtime.model import Model
from vortex_core.storage.materialize import shapes


@dataclass
class RandomTensors:
    """Stands for a part's file. A tensor depends on its name alone, and keeps the size of what it multiplies."""

    kind: str
    device: torch.device
    where: str = "nowhere"

    def __post_init__(self) -> None:
        self.sizes: dict[str, tuple[int, ...]] = {}

    def _draw(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.kind}.{name}".encode()))

    def is_nf4(self, name: str) -> bool:
        return True

    def read_nf4(self, name: str, home: torch.device) -> NF4Weight:
        (n, k), draw = self.sizes[name], self._draw(name)
        packed = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=draw, device=self.device)
        absmax = torch.rand(n, k // BLOCK, generator=draw, device=self.device).add_(0.5).div_(0.55 * k**0.5)
        return NF4Weight(packed, absmax).to(home)

    def read(self, name: str, home: torch.device) -> Tensor:
        shape = self.sizes[name]
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith(("weight", "scale"))), device=home)
        values = torch.randn(shape, generator=self._draw(name), device=self.device)
        return values.mul_(values[0].numel() ** -0.5).to(home)

    def nbytes(self, name: str) -> int:
        return 0

    def settle(self) -> None:
        pass


def random_engine(device: str, spec: ModelSpec | None = None, **options: Any) -> Engine:
    """`Engine.load` of a model in no file. `options`: some of `Engine.load`'s; default spec: the released one."""
    where = torch.device(device)
    tiny = open_bundle("tiny")
    tensors = {kind: RandomTensors(kind, where) for kind in tiny.parts}
    parts: Any = {kind: SimpleNamespace(tensors=one, words="random", nbytes=0) for kind, one in tensors.items()}
    bundle: Bundle = replace(tiny, name="random", spec=spec or ModelSpec(), parts=parts)

    def learn(model: Model, sources: Any) -> int:
        for kind, modules in model.modules.items():
            for module, prefix in modules:
                tensors[kind].sizes |= shapes(module, prefix)
        return 0

    names = ("quantization", "dtype", "backend", "vram_budget", "mode")
    chosen = [options.get(name, {"quantization": "nf4", "mode": "exact"}.get(name)) for name in names]
    with patch.object(Model, "check", learn):
        return Engine._load(lambda: bundle, (device, *chosen), False, None, None)
