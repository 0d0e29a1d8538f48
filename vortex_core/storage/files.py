"""Tensors as they are stored, under their stored names and types: from safetensors, GGUF, or a state dict.

Opening reads headers only, and nothing is mapped. Whatever is wrong with a file is a `VortexCheckpointError` that
names it. torch is imported when the first tensor is read, since headers do not need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import VortexCheckpointError, quoted
from ..utils.packages import remedy
from .filebytes import FileBytes, FileChanged
from .headers import MAGIC, Entry, Header, read_gguf, read_safetensors
from .refused_formats import beginning

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .upload import Upload

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
SAFETENSORS = (".safetensors", ".sft")
SMALL = 2**16  # bytes that `small` reads at most
CPU = "cpu"


class Raw(Protocol):
    """A source of tensors as they are stored; `Files` describes its methods.

    `files` are what it was read from, `where` names it in errors, and `metadata` is that of its files.
    """

    where: str
    files: tuple[Path, ...]

    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def is_as_opened(self) -> bool: ...
    def __contains__(self, name: str) -> bool: ...
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def nbytes(self, name: str) -> int: ...
    def small(self, name: str) -> bytes: ...
    def read(self, name: str, device: torch.device | str = CPU) -> Tensor: ...


class Files:
    """Tensors in files, found by their headers. The files stay open as long as this object lives.

    If `steady`, a file that changes while it is read is an error.
    """

    kind = ""

    def __init__(self, where: Path, paths: Iterable[Path], *, steady: bool = False) -> None:
        self._steady = steady
        self.where = str(where)
        self.files = tuple(paths)
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[FileBytes, Entry]] = {}
        self._opened: list[FileBytes] = []
        for path in self.files:
            try:
                file = FileBytes(path)
                self._opened.append(file)
                header = self._header(file)
            except (OSError, ValueError) as error:
                raise unreadable(path, self.kind, error) from error
            both = self._places.keys() & header.tensors.keys()
            if both:
                raise VortexCheckpointError(
                    f"{path} and {self._places[min(both)][0].path.name} beside it both hold {quoted(min(both))}: "
                    "one of them is left from another download. Remove it.",
                    path=str(path),
                )
            self.metadata |= header.metadata
            self._places |= {name: (file, entry) for name, entry in header.tensors.items()}

    def _header(self, file: FileBytes) -> Header:
        raise NotImplementedError

    @property
    def is_as_opened(self) -> bool:
        """Whether the files are still at their paths and unchanged. Raises `OSError`."""
        return all(file.is_as_opened for file in self._opened)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape in the header."""
        return self._places[name][1].shape

    def dtype(self, name: str) -> str:
        """The type in the header: `BF16` and others, or in GGUF such as `Q4_K`."""
        return self._places[name][1].dtype

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""
        return self._places[name][1].nbytes

    def file_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self._places[name][0].path

    def small(self, name: str) -> bytes:
        """A small tensor's bytes, such as JSON. Raises `ValueError` for one of more than `SMALL` bytes."""
        file, entry = self._places[name]
        if entry.nbytes > SMALL:
            raise ValueError(f"it has {entry.nbytes} bytes")
        try:
            return file.take(entry.offset, entry.nbytes)
        except OSError as error:
            raise unreadable(file.path, self.kind, error) from error

    def _fill(self, name: str, memory: memoryview) -> None:
        file, entry = self._places[name]
        try:
            file.read(entry.offset, memory)
            if self._steady:
                file.check()
        except OSError as error:
            raise unreadable(file.path, self.kind, error) from error


class SafetensorsFiles(Files):
    """The tensors of one or more safetensors files. Raises `VortexCheckpointError` for a damaged file."""

    kind = "safetensors"

    def __init__(self, where: Path, paths: Iterable[Path], *, steady: bool = False) -> None:
        super().__init__(where, paths, steady=steady)
        self._upload: Upload | None = None

    def _header(self, file: FileBytes) -> Header:
        return read_safetensors(file)

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """The tensor on `device`, in new memory."""
        import torch

        from .dtypes import DTYPES, fresh, memory_of

        device = torch.device(device)
        if device.type == "cuda":
            return self._uploaded(name, device)
        tensor = fresh(self.shape(name), DTYPES[self.dtype(name)])
        self._fill(name, memory_of(tensor))
        return tensor.to(device)

    def _uploaded(self, name: str, device: torch.device) -> Tensor:
        import torch

        from .dtypes import DTYPES
        from .upload import upload_to

        file, entry = self._places[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=device)
        if self._upload is None:
            self._upload = upload_to(device)
        try:
            self._upload(file, entry.offset, tensor)
            if self._steady:
                file.check()
        except OSError as error:
            raise unreadable(file.path, self.kind, error) from error
        return tensor


class StateDict:
    """Tensors that are already in memory."""

    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = {}
    is_as_opened = True

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
        """The tensor's type, by safetensors' name."""
        from .dtypes import WORDS

        dtype = self._tensors[name].dtype
        return WORDS.get(dtype, str(dtype))

    def nbytes(self, name: str) -> int:
        """Bytes in memory."""
        return self._tensors[name].nbytes

    def small(self, name: str) -> bytes:
        """A small tensor's bytes."""
        from .dtypes import memory_of

        if self.nbytes(name) > SMALL:
            raise ValueError(f"it has {self.nbytes(name)} bytes")
        return bytes(memory_of(self._tensors[name].detach().cpu().contiguous()))

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """A copy on `device`."""
        return self._tensors[name].detach().to(device, copy=True)


class GgufFile(Files):
    """A GGUF file. Raises `VortexCheckpointError` where it is damaged, or the package `gguf` is missing."""

    kind = "GGUF"

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path], steady=True)
        if find_spec("gguf") is None:
            raise VortexCheckpointError(
                f"{path} is a GGUF file; reading it needs the package gguf: {remedy('gguf')}.", path=str(path)
            )
        self._readable: set[str] = set()

    def _header(self, file: FileBytes) -> Header:
        return read_gguf(file)

    @property
    def architecture(self) -> str | None:
        """The model's architecture by its header; None where that does not tell."""
        return self.metadata.get("general.architecture")

    def check(self, name: str) -> None:
        """Raise `VortexCheckpointError` where `gguf` cannot dequantize a block of the tensor's type."""
        dtype = self.dtype(name)
        if dtype in self._readable:
            return
        try:
            import gguf
            import numpy as np

            kind = gguf.GGMLQuantizationType[dtype]
            gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
        except (NotImplementedError, KeyError) as error:
            raise VortexCheckpointError(
                f"{self.where}: {name} is {dtype}, which the package gguf cannot decode. "
                "Use a Q8_0, Q4_0, Q4_K, Q5_K or F16 file.",
                path=self.where,
            ) from error
        except Exception as error:  # of any kind: the package is broken, or too old
            raise VortexCheckpointError(
                f"{self.where} needs the package gguf, which does not work here ({quoted(error)}): "
                "pip install --force-reinstall gguf.",
                path=self.where,
            ) from error
        self._readable.add(dtype)

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """The tensor, dequantized to fp32."""
        import gguf
        import numpy as np
        import torch

        entry = self._places[name][1]
        shape = (entry.shape[:-1] or (1,)) if entry.nbytes else (0,)
        data = np.empty(entry.nbytes, dtype=np.uint8)
        self._fill(name, data.data)
        rows = data.reshape(*shape, -1) if entry.nbytes else data
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType[entry.dtype])
        return torch.from_numpy(values).view(entry.shape).to(device)


def open_file(path: Path) -> SafetensorsFiles | GgufFile:
    """One safetensors or GGUF file. Raises `VortexCheckpointError` for anything else, and says what it is."""
    ending = path.suffix.lower()
    if ending in PICKLES:
        raise VortexCheckpointError(pickle_message(path), path=str(path))
    if ending not in (*SAFETENSORS, ".gguf"):
        raise VortexCheckpointError(
            f"{path} is neither .safetensors nor .gguf; Vortex reads nothing else.", path=str(path)
        )
    return GgufFile(path) if _is_gguf(path, ending) else SafetensorsFiles(path, [path], steady=True)


def _is_gguf(path: Path, ending: str) -> bool:
    """Whether a file is GGUF, by its first bytes or its name's ending."""
    try:
        head = FileBytes(path).head(len(MAGIC))
    except OSError as error:
        raise unreadable(path, ending.removeprefix(".").upper(), error) from error
    return head == MAGIC or ending == ".gguf"


def unreadable(path: Path, kind: str, error: Exception) -> VortexCheckpointError:
    """The error for a file that cannot be opened or parsed: forbidden, out of reach, of another kind, or damaged."""
    if isinstance(error, PermissionError):
        message = f"{path} may not be read by this user ({error}). Change its permissions, or its owner."
    elif isinstance(error, FileChanged):
        message = f"{path} was changed while it was read ({error}). Load it again once whatever writes it is done."
    elif isinstance(error, OSError):
        message = f"{path} could not be read ({error.strerror or error}). Check the disk, the drive or the link."
    elif kind in (SafetensorsFiles.kind, GgufFile.kind) and (words := _beginning(path)) is not None:
        message = f"{path} is not a readable {kind} file: it is {words}"
    else:
        message = f"{path} is not a readable {kind} file ({error or type(error).__name__}). Download it again."
    return VortexCheckpointError(message, path=str(path))


def _beginning(path: Path) -> str | None:
    try:
        return beginning(FileBytes(path).head(512))
    except OSError:
        return None


def pickle_message(path: Path) -> str:
    """The message of the error for a pickle."""
    return (
        f"{path} is a pickle, which can run code when it is opened; Vortex reads safetensors only. "
        "Download the .safetensors version of this model."
    )
