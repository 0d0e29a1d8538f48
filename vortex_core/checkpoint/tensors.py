"""Named tensors, read one at a time: from safetensors files or from a state dict in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import VortexCheckpointError

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


class Tensors(Protocol):
    """What a loader needs to know of named tensors; a shape costs no data."""

    where: str

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


class SafetensorsFiles:
    """Memory-mapped safetensors files, as one. Raises `VortexCheckpointError` for a damaged one."""

    def __init__(self, where: Path, paths: Iterable[Path]) -> None:
        self.where = str(where)
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise VortexCheckpointError(
                    f"{path} is not a readable safetensors file ({error}). Download it again.", path=str(path)
                ) from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, backed by the mapped file."""
        return self._files[name].get_tensor(name)


class StateDict:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.where = where
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]


class Renamed:
    """A view of `source` under canonical names. `sources(name)` lists the tensors that make one, joined by rows."""

    def __init__(self, source: Tensors, sources: Callable[[str], tuple[str, ...]]) -> None:
        self.where = source.where
        self._source = source
        self._sources = sources

    def __contains__(self, name: str) -> bool:
        return all(part in self._source for part in self._sources(name))

    def names(self) -> Iterable[str]:
        """The names in the source; the canonical ones are the module's to ask for."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after joining."""
        shapes = [self._source.shape(part) for part in self._sources(name)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str) -> Tensor:
        """The joined tensor."""
        parts = [self._source.read(part) for part in self._sources(name)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if name.startswith("final_layer.adaLN_modulation"):
            # diffusers stores (scale, shift), BFL (shift, scale)
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor


def open_folder(folder: Path) -> SafetensorsFiles:
    """All `*.safetensors` of a model's subfolder; follows the index of a sharded model.

    Raises `VortexCheckpointError` for a missing or empty folder, a missing shard, and for pickles, by name.
    """
    if not folder.is_dir():
        raise VortexCheckpointError(f"Expected a folder at {folder}; there is none.", path=str(folder))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        shards = [folder / name for name in names]
        missing = [path.name for path in shards if not path.is_file()]
        if missing:
            raise VortexCheckpointError(
                f"{folder} lacks {', '.join(missing)}, which its index names. The download is incomplete; "
                "run it again.",
                path=str(folder),
            )
        return SafetensorsFiles(folder, shards)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
        if pickles:
            raise VortexCheckpointError(pickle_message(folder / pickles[0]), path=str(folder / pickles[0]))
        raise VortexCheckpointError(f"{folder} holds no .safetensors file.", path=str(folder))
    return SafetensorsFiles(folder, shards)


def pickle_message(path: Path) -> str:
    """The sentence a pickle gets."""
    return (
        f"{path} is a pickle, which can run code when it is opened; Vortex reads safetensors only. "
        "Download the .safetensors version of this model."
    )
