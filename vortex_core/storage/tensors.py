"""Canonical tensors from files in any form, read one at a time.

Two views over raw files: `Stored` undoes the storage (NF4, fp8 and its scales), `Renamed` gives canonical names and
joins rows. Shapes and checks read no data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import VortexCheckpointError, quoted
from ..nf4 import BLOCK, LEVELS, NF4Weight, dequantize, join
from .files import CPU, GgufFile, Raw
from .finite_weights import Finite
from .refused_formats import READ, layer_format, layers_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NF4_STATE = ".quant_state.bitsandbytes__nf4"
COMFY = ".comfy_quant"  # ComfyUI's description of a layer, JSON
NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
FP8_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name, beside `.weight`
FP8_OTHERS = (".scale_input", ".input_scale", COMFY)
FP8_TYPES = ("F8_E4M3", "F8_E5M2")
SCALES = ("F64", "F32", "F16", "BF16")
PACKED = ("U8", "I8", "F16", "BF16", "F32")  # types that bitsandbytes stores packed bytes as
FLOATS = (*SCALES, *FP8_TYPES)
AGAIN = "The file is damaged or of another kind; download it again."
QUOTES = "'\""


class Tensors(Protocol):
    """What a loader needs: logical tensors, however they are stored. `Stored` describes the methods."""

    where: str

    def __contains__(self, name: str) -> bool: ...
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def nbytes(self, name: str) -> int: ...
    def check(self, name: str, *, scales: bool = True) -> None: ...
    def is_nf4(self, name: str) -> bool: ...
    def read(self, name: str, device: torch.device | str = CPU) -> Tensor: ...
    def read_nf4(self, name: str, device: torch.device | str = CPU) -> NF4Weight: ...
    def settle(self) -> None: ...


def check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, *, scales: bool = True) -> int:
    """Compare names, types and `shapes` with the headers, and return the bytes that will be read.

    Reads no data, but with `scales` those of NF4 weights, to find NaN and infinity. Raises `VortexCheckpointError`
    naming the first tensors that are missing or of another type or shape.
    """
    total = 0
    missing, other = [], []
    for name, shape in shapes.items():
        if name not in tensors:
            missing.append(name)
        elif _squeezed(tensors.shape(name)) != _squeezed(shape):
            other.append(f"{name}: expected {shape}, found {tensors.shape(name)}")
        else:
            tensors.check(name, scales=scales)
            total += tensors.nbytes(name)
    if missing:
        raise VortexCheckpointError(
            f"{tensors.where} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}. "
            "It is another model, or the download is incomplete: run it again.",
            path=tensors.where,
        )
    if other:
        raise VortexCheckpointError(
            f"{tensors.where} does not fit together: {'; '.join(other[:3])}. Download it again.",
            path=tensors.where,
        )
    return total


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    # the VAE's 1x1 convolutions are linears in Vortex and in diffusers, but not in BFL's file
    return shape[:2] if shape[2:] == (1, 1) else shape


@dataclass(frozen=True, slots=True)
class State:
    """The metadata of a packed weight: `[n, k]`, and for nested scales their block and offset."""

    n: int
    k: int
    nested: tuple[int, float] | None


class Stored:
    """Logical tensors of a raw source under a prefix: NF4 (plain or nested) and fp8 with scales become weights.

    A tensor beside a weight must be understood, or is refused. `trusted` files were written by Vortex, which has
    checked that every scale is finite. Raises `VortexCheckpointError` for weights that are packed in another way.
    """

    def __init__(self, raw: Raw, prefix: str = "", *, trusted: bool = False) -> None:
        self.where = raw.where
        self.raw = raw
        self.prefix = prefix
        own = [name.removeprefix(prefix) for name in raw.names() if name.startswith(prefix)]
        self.nf4 = {name.removesuffix(NF4_STATE): self._state(name) for name in own if name.endswith(NF4_STATE)}
        self._types = dict(self._layers(own))
        companions = self._companions(own)
        self._names = {name for name in own if name not in companions and name != "scaled_fp8"}
        self.scaled = any(name.endswith(FP8_SCALES) for name in companions)
        self._seen = set(self.nf4) if trusted else set()  # NF4 weights whose scales were found to be finite
        self._finite = Finite(self.where)

    def _state(self, key: str) -> State:
        name = key.removesuffix(NF4_STATE)
        try:
            state: dict[str, Any] = json.loads(self.raw.small(self.prefix + key))
            kind, block = state["quant_type"], state["blocksize"]
            n, k = (int(size) for size in state["shape"])
            nested = None
            if f"{self.prefix}{name}.nested_absmax" in self.raw:
                nested = int(state["nested_blocksize"]), float(state["nested_offset"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._error(name, f"does not say how it was quantized ({quoted(error)}). {AGAIN}") from error
        if (kind, block) != ("nf4", BLOCK):
            raise self._error(
                name,
                f"is {quoted(kind).strip(QUOTES)} with blocks of {quoted(block)}; Vortex reads nf4 with blocks of "
                f"{BLOCK}. Use such a file, or bf16.",
            )
        if n < 1 or k < 1 or k % BLOCK or (nested and (nested[0] < 1 or not math.isfinite(nested[1]))):
            raise self._error(
                name, f"is {quoted(n)} x {quoted(k)} in NF4, nested {quoted(nested)}, which cannot be. {AGAIN}"
            )
        return State(n, k, nested)

    def _layers(self, own: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Weights and their types by ComfyUI's descriptions of layers; some are stored as plain bytes."""
        try:
            layers = {layer.removeprefix(self.prefix): value for layer, value in layers_of(self.raw.metadata).items()}
            described = [name for name in own if name.endswith(COMFY)]
            layers |= {name.removesuffix(COMFY): json.loads(self.raw.small(self.prefix + name)) for name in described}
        except (ValueError, RecursionError) as error:
            raise self._error("", f"does not say how its layers were quantized ({error}). {AGAIN}") from error
        for layer, value in layers.items():
            dtype, words = layer_format(value)
            weight = f"{layer}.weight"
            if self.prefix + weight not in self.raw:
                continue
            if dtype is None:
                raise self._error(weight, f"is {words}, which Vortex does not read. {READ}")
            yield weight, dtype

    def _companions(self, own: Iterable[str]) -> set[str]:
        """The tensors beside weights that tell how to read them. Raises where one is not understood."""
        modules = {name.removesuffix(".weight") for name in own if name.endswith(".weight")}
        found = set()
        for name in own:
            module = next((name[:i] for i, mark in enumerate(name) if mark in "._:" and name[:i] in modules), None)
            if module is None or name in (f"{module}.weight", f"{module}.bias"):
                continue
            if name.removeprefix(module) not in self._understood(module):
                raise self._error(
                    name,
                    f"lies beside a weight in {self._dtype(f'{module}.weight')} and is nothing that Vortex knows: the "
                    f"weight may be quantized in a way that it does not read. {READ}",
                )
            found.add(name)
        return found

    def _understood(self, module: str) -> tuple[str, ...]:
        weight = f"{module}.weight"
        if weight in self.nf4:
            return tuple(f".weight{part}" for part in NF4_PARTS)
        return (*FP8_SCALES, *FP8_OTHERS) if self._dtype(weight) in FP8_TYPES else ()

    def _dtype(self, name: str) -> str:
        stored = self.raw.dtype(self.prefix + name)
        return self._types.get(name, stored) if stored == "U8" else stored

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> Iterable[str]:
        """Every logical tensor's name."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape."""
        state = self.nf4.get(name)
        return (state.n, state.k) if state else self.raw.shape(self.prefix + name)

    def dtype(self, name: str) -> str:
        """The stored type, such as `BF16`, `NF4` or `Q4_K`."""
        return "NF4" if name in self.nf4 else self._dtype(name)

    def nbytes(self, name: str) -> int:
        """Bytes in the file, with scales; progress is counted in them."""
        whole = self.prefix + name
        stored = (whole, f"{whole}.absmax") if name in self.nf4 else (whole,)
        return sum(self.raw.nbytes(part) for part in stored if part in self.raw)

    def check(self, name: str, *, scales: bool = True) -> None:
        """Check the types and sizes of a tensor's parts by headers. Raises `VortexCheckpointError` naming the tensor.

        With `scales`, also check that scales of NF4 are finite, and that GGUF can be dequantized.
        """
        state = self.nf4.get(name)
        if state is not None:
            self._check_nf4(name, state)
            if scales and name not in self._seen:
                self._check_scales(name, state)
                self._seen.add(name)
        elif isinstance(self.raw, GgufFile):
            if scales:
                self.raw.check(self.prefix + name)
        else:
            if self._dtype(name) not in FLOATS:
                raise self._error(name, f"is {self._dtype(name)}; expected {' or '.join(FLOATS)}. {AGAIN}")
            scale = self._scale_name(name)
            if scale is not None:
                self._expect(scale, SCALES)
                shape = self.raw.shape(self.prefix + scale)
                if math.prod(shape) != 1 and (shape[:1] != self.shape(name)[:1] or math.prod(shape[1:]) != 1):
                    values = math.prod(shape)
                    raise self._error(scale, f"holds {values} values, neither one nor one a row, but {shape}. {AGAIN}")

    def _check_nf4(self, name: str, state: State) -> None:
        blocks = state.n * state.k // BLOCK
        nbytes = self.raw.nbytes(self.prefix + name)  # of any type in `PACKED`
        dtype = self.raw.dtype(self.prefix + name)
        if nbytes != state.n * state.k // 2 or dtype not in PACKED:
            raise self._error(name, f"holds {nbytes} bytes of {dtype}; expected {state.n * state.k // 2}. {AGAIN}")
        self._expect(f"{name}.quant_map", SCALES, len(LEVELS))
        if state.nested is None:
            self._expect(f"{name}.absmax", SCALES, blocks)
        else:
            self._expect(f"{name}.absmax", ("U8",), blocks)
            self._expect(f"{name}.nested_absmax", SCALES, -(-blocks // state.nested[0]))
            self._expect(f"{name}.nested_quant_map", SCALES, 256)

    def _check_scales(self, name: str, state: State) -> None:
        import torch

        parts = ("absmax",) if state.nested is None else ("nested_absmax", "nested_quant_map")
        for part in parts:
            self._read(f"{name}.{part}")
        levels = self._read(f"{name}.quant_map").float().view(-1)
        if not torch.allclose(levels, torch.tensor(LEVELS), atol=1e-3):
            raise self._error(name, f"has levels other than NF4's. {AGAIN}")

    def _expect(self, name: str, dtypes: tuple[str, ...], values: int | None = None) -> None:
        whole = self.prefix + name
        if whole not in self.raw:
            raise self._error(name, f"is missing. {AGAIN}")
        dtype, found = self.raw.dtype(whole), math.prod(self.raw.shape(whole))
        if dtype not in dtypes:
            raise self._error(name, f"is {dtype}; expected {' or '.join(dtypes)}. {AGAIN}")
        if values is not None and found != values:
            raise self._error(name, f"holds {found} values; expected {values}. {AGAIN}")

    def _error(self, name: str, what: str) -> VortexCheckpointError:
        return VortexCheckpointError(f"{self.where}: {self.prefix}{name} {what}", path=self.where)

    def is_nf4(self, name: str) -> bool:
        """Whether the tensor is stored in NF4."""
        return name in self.nf4

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """The tensor in 16 or 32 bits on `device`. What is not finite shows in `settle`, on the CPU at once."""
        import torch

        from .dtypes import DTYPES

        if name in self.nf4:
            return dequantize(self.read_nf4(name, device), torch.float32)
        tensor = self.raw.read(self.prefix + name, device)
        if self._dtype(name) in FP8_TYPES:
            tensor = tensor.view(DTYPES[self._dtype(name)])
            scale = self._scale_name(name)
            if scale is None:
                tensor = tensor.to(torch.bfloat16)  # fp8 fits bf16 exactly; a scaled value does not
            else:
                factor = self._read(scale, device).float()
                tensor = tensor.float().mul_(factor.view(-1, *[1] * (tensor.ndim - 1)))
        return self._finite.watch(self.prefix + name, tensor)

    def _read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        return self._finite.watch(self.prefix + name, self.raw.read(self.prefix + name, device))

    def _scale_name(self, name: str) -> str | None:
        stem = name.removesuffix(".weight")
        return next((stem + suffix for suffix in FP8_SCALES if self.prefix + stem + suffix in self.raw), None)

    def read_nf4(self, name: str, device: torch.device | str = CPU) -> NF4Weight:
        """The packed weight on `device`, with plain scales; only where `is_nf4`."""
        import torch

        state, whole = self.nf4[name], self.prefix + name
        if state.nested is None:
            absmax = self._read(f"{name}.absmax", device)
        else:
            block, offset = state.nested
            levels = self._read(f"{name}.nested_quant_map", device).view(-1)
            scales = self._read(f"{name}.nested_absmax", device).view(-1).repeat_interleave(block)
            absmax = self.raw.read(f"{whole}.absmax", device)
            absmax = levels[absmax.view(-1).int()] * scales[: absmax.numel()] + offset
        packed = self.raw.read(whole, device).view(-1).view(torch.uint8).view(state.n, state.k // 2)
        return NF4Weight(packed, absmax.float().view(state.n, state.k // BLOCK))

    def settle(self) -> None:
        """Raise `VortexCheckpointError` if a tensor that was read to a GPU holds NaN or infinity."""
        self._finite.settle()


class Renamed:
    """`source` under canonical names. `sources(name)` lists the stored tensors that are joined, by rows, to one.

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
        """The names in the source, which are not canonical."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after joining."""
        shapes = [self._source.shape(part) for part in self._sources(name)]
        return shapes[0] if len(shapes) == 1 else (sum(math.prod(shape[:1]) for shape in shapes), *shapes[0][1:])

    def nbytes(self, name: str) -> int:
        """Bytes in the file, approximately."""
        return sum(self._source.nbytes(part) for part in self._sources(name))

    def check(self, name: str, *, scales: bool = True) -> None:
        """See `Stored.check`; also that joined tensors are equally wide."""
        parts = self._sources(name)
        for part in parts:
            self._source.check(part, scales=scales)
        shapes = {part: self._source.shape(part) for part in parts}
        if len({shape[1:] for shape in shapes.values()}) > 1:
            raise VortexCheckpointError(
                f"{self.where}: the parts of {name} differ in width: {shapes}. {AGAIN}", path=self.where
            )

    def is_nf4(self, name: str) -> bool:
        """Whether all parts of the tensor are stored in NF4."""
        return all(self._source.is_nf4(part) for part in self._sources(name))

    def read(self, name: str, device: torch.device | str = CPU) -> Tensor:
        """The joined tensor."""
        import torch

        parts = [self._source.read(part, device) for part in self._sources(name)]
        if name.startswith(self._swapped):
            parts = [*torch.cat(parts).chunk(2)[::-1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_nf4(self, name: str, device: torch.device | str = CPU) -> NF4Weight:
        """The joined packed weight, bit for bit; only where `is_nf4`."""
        packed = [self._source.read_nf4(part, device) for part in self._sources(name)]
        if name.startswith(self._swapped):
            packed = [*join(packed).halves()[::-1]]
        return packed[0] if len(packed) == 1 else join(packed)

    def settle(self) -> None:
        """See `Stored.settle`."""
        self._source.settle()
