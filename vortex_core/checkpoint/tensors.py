"""Named tensors, read one at a time: from safetensors files, a GGUF file, or a state dict in memory.

Three views, one on the other: a raw source (files), `Stored` (storage formats undone: NF4, fp8, scales), and
`Renamed` (canonical names, joined rows). Shapes cost no data anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import VortexCheckpointError
from ..nf4 import BLOCK, NF4Weight, dequantize, join

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
CPU = torch.device("cpu")
NF4_STATE = ".quant_state.bitsandbytes__nf4"
FP4_STATE = ".quant_state.bitsandbytes__fp4"
NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
FP8_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name, beside `.weight`
FP8_OTHERS = (".scale_input", ".input_scale", ".comfy_quant")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}


class Raw(Protocol):
    """A source of tensors as they are stored. `files` are what it was read from; `where` names it in errors."""

    where: str
    files: tuple[Path, ...]

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def read(self, name: str) -> Tensor: ...


class Tensors(Protocol):
    """What a loader needs: logical tensors, whatever they are stored as."""

    where: str

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int: ...

    def read(self, name: str, device: torch.device = CPU) -> Tensor: ...

    def read_nf4(self, name: str, device: torch.device = CPU) -> NF4Weight | None: ...


class SafetensorsFiles:
    """Memory-mapped safetensors files, as one. Raises `VortexCheckpointError` for a damaged one."""

    def __init__(self, where: Path, paths: Iterable[Path]) -> None:
        self.where = str(where)
        self.files = tuple(paths)
        self._files: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Map the files anew, so that what was read of them no longer counts as this process' memory."""
        self._files.clear()
        for path in self.files:
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

    def dtype(self, name: str) -> str:
        """The type in the header, such as `BF16`."""
        return str(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, backed by the mapped file."""
        return self._files[name].get_tensor(name)


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
        return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}.get(
            self._tensors[name].dtype, str(self._tensors[name].dtype)
        )

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]


class GgufFile:
    """A GGUF file, decoded by the `gguf` package. Raises `VortexCheckpointError` where it is damaged or missing."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise VortexCheckpointError(
                f"{path} is a GGUF file; reading it needs the package gguf: pip install gguf.", path=str(path)
            ) from error
        self._gguf: Any = gguf
        self.where = str(path)
        self.files: tuple[Path, ...] = (path,)
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise VortexCheckpointError(
                f"{path} is not a readable GGUF file ({error}). Download it again.", path=str(path)
            ) from error
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

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

    def read(self, name: str) -> Tensor:
        """The tensor, decoded to fp32."""
        tensor = self._tensors[name]
        values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(values.copy()).view(self.shape(name))


class Stored:
    """Logical tensors of a raw source under a prefix: NF4 (plain or nested), fp8 and its scales look like weights.

    Raises `VortexCheckpointError` for 4-bit formats that are not NF4 with blocks of 64.
    """

    def __init__(self, raw: Raw, prefix: str = "") -> None:
        self.where = raw.where
        self.raw = raw
        self.prefix = prefix
        own = [name.removeprefix(prefix) for name in raw.names() if name.startswith(prefix)]
        self.nf4 = {
            name.removesuffix(NF4_STATE): self._state(prefix + name) for name in own if name.endswith(NF4_STATE)
        }
        if any(name.endswith(FP4_STATE) for name in own):
            raise VortexCheckpointError(f"{raw.where} is in FP4; Vortex reads NF4.", path=raw.where)
        hidden = (*NF4_PARTS, *FP8_SCALES, *FP8_OTHERS)
        self._names = {name for name in own if not name.endswith(hidden) and name != "scaled_fp8"}
        self.scaled = any(name.endswith(FP8_SCALES) for name in own)

    def _state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(bytes(self.raw.read(name).tolist()))
        if state["quant_type"] != "nf4" or state["blocksize"] != BLOCK:
            raise VortexCheckpointError(
                f"{self.where}: {name.removesuffix(NF4_STATE)} is {state['quant_type']} with blocks of "
                f"{state['blocksize']}; Vortex reads nf4 with blocks of {BLOCK}.",
                path=self.where,
            )
        return state

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> Iterable[str]:
        """Every logical tensor's name."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.nf4[name]["shape"]) if name in self.nf4 else self.raw.shape(self.prefix + name)

    def nbytes(self, name: str) -> int:
        """Bytes in the file, about; what progress is counted in."""
        values = 1
        for size in self.shape(name):
            values *= size
        return values // 2 if name in self.nf4 else values * BYTES.get(self.raw.dtype(self.prefix + name), 1)

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor in 16 or 32 bits on `device`, decoded there."""
        packed = self.read_nf4(name, device)
        if packed is not None:
            return dequantize(packed, torch.float32)
        tensor = self.raw.read(self.prefix + name).to(device)
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = self._scale(name)
            # fp8 fits bf16 exactly; a scaled value does not
            return tensor.to(torch.bfloat16) if scale is None else tensor.float() * scale.to(device)
        return tensor

    def _scale(self, name: str) -> Tensor | None:
        stem = self.prefix + name.removesuffix(".weight")
        for suffix in FP8_SCALES:
            if stem + suffix in self.raw:
                scale = self.raw.read(stem + suffix).float()
                return scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
        return None

    def read_nf4(self, name: str, device: torch.device = CPU) -> NF4Weight | None:
        """The packed weight, un-nested, or None if it is not stored in NF4."""
        if name not in self.nf4:
            return None
        n, k = self.nf4[name]["shape"]
        whole = self.prefix + name
        absmax = self.raw.read(f"{whole}.absmax").to(device)
        if f"{whole}.nested_absmax" in self.raw:
            absmax = self._unnested(whole, absmax, self.nf4[name])
        packed = self.raw.read(whole).to(device).view(n, k // 2)
        return NF4Weight(packed, absmax.float().view(n, k // BLOCK))

    def _unnested(self, whole: str, absmax: Tensor, state: dict[str, Any]) -> Tensor:
        levels = self.raw.read(f"{whole}.nested_quant_map").to(absmax.device)
        scales = self.raw.read(f"{whole}.nested_absmax").to(absmax.device)
        scales = scales.repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
        return levels[absmax.int()] * scales + state["nested_offset"]


class Renamed:
    """`source` under canonical names. `sources(name)` lists the tensors that make one, joined by rows in that order.

    `swapped` names the modules whose two halves change places.
    """

    def __init__(
        self, source: Tensors, sources: Callable[[str], tuple[str, ...]], swapped: tuple[str, ...] = ()
    ) -> None:
        self.where = source.where
        self._source = source
        self._sources = sources
        self._swapped = swapped

    def __contains__(self, name: str) -> bool:
        try:
            return all(part in self._source for part in self._sources(name))
        except KeyError:
            return False

    def names(self) -> Iterable[str]:
        """The names in the source; the canonical ones are the module's to ask for."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after joining."""
        shapes = [self._source.shape(part) for part in self._sources(name)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def nbytes(self, name: str) -> int:
        """Bytes in the file, about."""
        return sum(self._source.nbytes(part) for part in self._sources(name))

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The joined tensor."""
        parts = [self._source.read(part, device) for part in self._sources(name)]
        if name.startswith(self._swapped):
            parts = [*torch.cat(parts).chunk(2)[::-1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_nf4(self, name: str, device: torch.device = CPU) -> NF4Weight | None:
        """The joined packed weight, bit for bit, or None unless all of it is stored in NF4."""
        parts = [self._source.read_nf4(part, device) for part in self._sources(name)]
        packed = [part for part in parts if part is not None]
        if len(packed) < len(parts):
            return None
        if name.startswith(self._swapped):
            packed = [*join(packed).halves()[::-1]]
        return packed[0] if len(packed) == 1 else join(packed)


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
        pickles = [path for path in folder.iterdir() if path.suffix in PICKLES]
        if pickles:
            raise VortexCheckpointError(pickle_message(pickles[0]), path=str(pickles[0]))
        raise VortexCheckpointError(f"{folder} holds no .safetensors file.", path=str(folder))
    return SafetensorsFiles(folder, shards)


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


def pickle_message(path: Path) -> str:
    """The sentence a pickle gets."""
    return (
        f"{path} is a pickle, which can run code when it is opened; Vortex reads safetensors only. "
        "Download the .safetensors version of this model."
    )
