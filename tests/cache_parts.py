"""A small model in a file, kept by the cache, and how to harm what is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vortex_core.checkpoint.cache import Cache
from vortex_core.checkpoint.dialects import Part
from vortex_core.quant.backends import ReferenceBackend
from vortex_core.storage.files import SafetensorsFiles
from vortex_core.storage.materialize import Target, materialize, pack
from vortex_core.storage.tensors import Stored

CPU = torch.device("cpu")


def module() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(64, 3), nn.Linear(128, 2), nn.LayerNorm(5))


class Source:
    """A small model in a file, and what came of keeping it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        made = nn.Sequential(nn.Linear(64, 3), nn.Linear(128, 2), nn.LayerNorm(5))
        save_file({name: p.detach() for name, p in made.named_parameters()}, self.path)
        self.folder = folder / "cache"
        self.progress: Callable[[int], None] = lambda nbytes: None

    def part(self) -> Part:
        stored = Stored(SafetensorsFiles(self.path, [self.path]))
        return Part(stored, stored, "fp32")

    def keep(self, folder: Path | None = None) -> dict[str, Tensor]:
        """Every tensor, read through the cache into a module as a load does; packed weights as bytes."""
        filled, target = module(), Target(CPU, torch.float32, self.progress)
        pack(filled, "", ReferenceBackend())
        tensors = Cache(folder or self.folder).quantized(self.part(), "t5", [(filled, "")], target)
        materialize(filled, tensors, target)
        return {name: value.clone() for name, value in filled.state_dict().items()}

    @property
    def entry(self) -> Path:
        (entry,) = Cache(self.folder).entries()
        return entry.path

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def make_older(path: Path) -> None:
    """The entry as Vortex wrote it before there were checksums: a manifest beside, with the file's SHA-256."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for key in ("checksums", "entry"):
        del header["__metadata__"][key]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    said = {"source": "x", "kind": "t5", "words": "fp32", "format": 1}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({**said, "sha256": sha256}))


def flip(path: Path) -> None:
    """Change one packed weight, which still decodes."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + json.loads(data[8:start])["1.weight"]["data_offsets"][0]] ^= 16
    path.write_bytes(data)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's folder is, for tests that may run as root."""

    def refuse(*arguments: object, **more: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    def look(path: Any, flags: int, *arguments: Any) -> int:
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR) else really(path, flags, *arguments)

    really = os.open
    monkeypatch.setattr(os, "open", look)
    for name in ("utime", "replace", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
