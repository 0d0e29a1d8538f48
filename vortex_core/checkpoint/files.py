"""Tensors as they are stored, under the names and types they have there: safetensors, GGUF, or a state dict.

Opening reads headers only. Whatever is wrong with a file is a `VortexCheckpointError` that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import VortexCheckpointError
from ..packages import missing
from .upload import FileBytes, Upload, upload_to

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
CPU = torch.device("cpu")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}  # safetensors' words for what FLUX files hold
MAPPED = 200 * 10**6  # bytes read from mapped files before they are mapped anew; T5's table of tokens has 263 MB
WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Raw(Protocol):
    """A source of tensors as they are stored. `files` are what it was read from; `where` names it in errors."""

    where: str
    files: tuple[Path, ...]

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def nbytes(self, name: str) -> int: ...

    def read(self, name: str, device: torch.device = CPU) -> Tensor: ...


class SafetensorsFiles:
    """Memory-mapped safetensors files, as one. Raises `VortexCheckpointError` for a damaged one."""

    def __init__(self, where: Path, paths: Iterable[Path]) -> None:
        self.where = str(where)
        self.files = tuple(paths)
        self._upload: Upload | None = None
        self._map()

    def _map(self) -> None:
        files: dict[str, Any] = {}
        for path in self.files:
            try:
                path.open("rb").close()  # safe_open says of a forbidden file that there is none
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise unreadable(path, "safetensors", error) from error
            files.update(dict.fromkeys(file.keys(), file))
        self._files = files
        self._mapped = 0

    @cached_property
    def _places(self) -> dict[str, tuple[FileBytes, int]]:
        """Each tensor's file, and where it begins there. The headers were checked when the files were mapped."""
        places = {}
        for path in self.files:
            file = FileBytes(path)
            with path.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
            for name in header.keys() - {"__metadata__"}:
                places[name] = file, 8 + size + header[name]["data_offsets"][0]
        return places

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type in the header, such as `BF16`."""
        return str(self._files[name].get_slice(name).get_dtype())

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        dtype = DTYPES.get(self.dtype(name), torch.uint8)
        return torch.Size(self.shape(name)).numel() * dtype.itemsize

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor on `device`; on the CPU it is the mapped file itself."""
        if device.type == "cuda":
            return self._uploaded(name, device)
        tensor: Tensor = self._files[name].get_tensor(name)
        self._mapped += tensor.nbytes
        if self._mapped > MAPPED:
            self._map()  # or what was read before would still count as this process' memory
        return tensor.to(device)

    def _uploaded(self, name: str, device: torch.device) -> Tensor:
        tensor = torch.empty(self.shape(name), dtype=DTYPES[self.dtype(name)], device=device)
        if self._upload is None:
            self._upload = upload_to(device)
        try:
            self._upload(*self._places[name], tensor)
        except OSError as error:
            raise unreadable(Path(self.where), "safetensors", error) from error
        return tensor


class StateDict:
    """Tensors that are already in memory."""

    files: tuple[Path, ...] = ()

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

    def dtype(self, name: str) -> str:
        """The tensor's type, in safetensors' words."""
        dtype = self._tensors[name].dtype
        return WORDS.get(dtype, str(dtype))

    def nbytes(self, name: str) -> int:
        """Bytes in memory."""
        return self._tensors[name].nbytes

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor itself, or a copy on `device`."""
        return self._tensors[name].to(device)


class GgufFile:
    """A GGUF file, decoded by the `gguf` package. Raises `VortexCheckpointError` where it is damaged or missing."""

    def __init__(self, path: Path) -> None:
        why = missing("gguf")
        if why is not None:
            raise VortexCheckpointError(
                f"{path} is a GGUF file; reading it needs the package gguf, which {why}: pip install gguf.",
                path=str(path),
            )
        import gguf

        self._gguf: Any = gguf
        self.where = str(path)
        self.files: tuple[Path, ...] = (path,)
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:
            # Its parser trusts every length and type: a damaged header shows as any exception.
            raise unreadable(path, "GGUF", error) from error
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        for kind, name in {tensor.tensor_type: tensor.name for tensor in reader.tensors}.items():
            self._try_decoding(kind, name)

    def _try_decoding(self, kind: Any, name: str) -> None:
        import numpy as np

        try:
            self._gguf.dequantize(np.zeros(self._gguf.GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise VortexCheckpointError(
                f"{self.where}: {name} is {kind.name}, which the package gguf cannot decode. "
                "Use a Q8_0, Q4_0, Q4_K, Q5_K or F16 file.",
                path=self.where,
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape; GGUF stores it innermost first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        """GGUF's own name of the type, such as `Q4_K`."""
        return str(self._tensors[name].tensor_type.name)

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        return int(self._tensors[name].n_bytes)

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor, decoded to fp32."""
        tensor = self._tensors[name]
        values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        if not values.flags.writeable:  # fp32 comes back as the mapped file
            values = values.copy()
        return torch.from_numpy(values).view(self.shape(name)).to(device)


def open_folder(folder: Path) -> SafetensorsFiles:
    """All `*.safetensors` of a model's subfolder; follows the index of a sharded model.

    Raises `VortexCheckpointError` for a missing or empty folder, a missing shard, and for pickles, by name.
    """
    if not folder.is_dir():
        raise VortexCheckpointError(f"Expected a folder at {folder}; there is none.", path=str(folder))
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, "model", error) from error
    indices = [path for path in files if path.name.endswith(".safetensors.index.json")]
    shards = _indexed(indices[0]) if indices else [path for path in files if path.suffix == ".safetensors"]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise VortexCheckpointError(
            f"{folder} lacks {', '.join(missing)}, which its index names. The download is incomplete; run it again.",
            path=str(folder),
        )
    if not shards:
        pickles = [path for path in files if path.suffix in PICKLES]
        if pickles:
            raise VortexCheckpointError(pickle_message(pickles[0]), path=str(pickles[0]))
        raise VortexCheckpointError(
            f"{folder} holds no .safetensors file. Download the model's weights into it.", path=str(folder)
        )
    return SafetensorsFiles(folder, shards)


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VortexCheckpointError(
            f"{index} is not an index of shards ({error!r}). Download it again.", path=str(index)
        ) from error
    if outside:
        raise VortexCheckpointError(
            f"{index} names {outside[0]!r}, which is not a file beside it. Download the model again.", path=str(index)
        )
    return [index.parent / name for name in names]


def open_file(path: Path) -> Raw:
    """A single safetensors or GGUF file. Raises `VortexCheckpointError` for anything else, pickles by name."""
    if path.suffix in PICKLES:
        raise VortexCheckpointError(pickle_message(path), path=str(path))
    if path.suffix == ".gguf":
        return GgufFile(path)
    if path.suffix != ".safetensors":
        raise VortexCheckpointError(
            f"{path} is neither .safetensors nor .gguf; Vortex reads nothing else.", path=str(path)
        )
    return SafetensorsFiles(path, [path])


def unreadable(path: Path, kind: str, error: Exception) -> VortexCheckpointError:
    """What a file that cannot be opened or parsed gets: forbidden, or damaged."""
    if isinstance(error, PermissionError):
        message = f"{path} may not be read by this user ({error}). Change its permissions, or its owner."
    else:
        message = f"{path} is not a readable {kind} file ({error or type(error).__name__}). Download it again."
    return VortexCheckpointError(message, path=str(path))


def pickle_message(path: Path) -> str:
    """The sentence a pickle gets."""
    return (
        f"{path} is a pickle, which can run code when it is opened; Vortex reads safetensors only. "
        "Download the .safetensors version of this model."
    )
