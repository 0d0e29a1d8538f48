"""Canonical tensors of a file: what is stored in any form, read one at a time.

Two views over raw files: `Stored` undoes storage (NF4, fp8 and its scales), `Renamed` gives canonical names and
joins rows. Shapes and checks cost no data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import VortexCheckpointError
from ..nf4 import BLOCK, LEVELS, NF4Weight, dequantize, join
from .files import CPU, GgufFile, Raw

NF4_STATE = ".quant_state.bitsandbytes__nf4"
FP4_STATE = ".quant_state.bitsandbytes__fp4"
NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
FP8_SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's older and newer name, beside `.weight`
FP8_OTHERS = (".scale_input", ".input_scale", ".comfy_quant")
SCALES = ("F64", "F32", "F16", "BF16")
FLOATS = (*SCALES, "F8_E4M3", "F8_E5M2")
AGAIN = "The file is damaged or of another kind; download it again."


class Tensors(Protocol):
    """What a loader needs: logical tensors, whatever they are stored as."""

    where: str

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int: ...

    def check(self, name: str, *, scales: bool = True) -> None: ...

    def is_nf4(self, name: str) -> bool: ...

    def read(self, name: str, device: torch.device = CPU) -> Tensor: ...

    def read_nf4(self, name: str, device: torch.device = CPU) -> NF4Weight: ...


@dataclass(frozen=True, slots=True)
class State:
    """What a packed weight says of itself: `[n, k]`, and for nested scales their block and offset."""

    n: int
    k: int
    nested: tuple[int, float] | None


class Stored:
    """Logical tensors of a raw source under a prefix: NF4 (plain or nested), fp8 and its scales look like weights.

    `trusted` files were written by Vortex, which saw that every scale is finite. Raises `VortexCheckpointError` for
    4-bit formats that are not NF4 with blocks of 64.
    """

    def __init__(self, raw: Raw, prefix: str = "", *, trusted: bool = False) -> None:
        self.where = raw.where
        self.raw = raw
        self.prefix = prefix
        own = [name.removeprefix(prefix) for name in raw.names() if name.startswith(prefix)]
        fp4 = [name for name in own if name.endswith(FP4_STATE)]
        if fp4:
            raise self._error(fp4[0].removesuffix(FP4_STATE), "is in FP4; Vortex reads NF4. Use an NF4 or bf16 file.")
        self.nf4 = {name.removesuffix(NF4_STATE): self._state(name) for name in own if name.endswith(NF4_STATE)}
        hidden = (*NF4_PARTS, *FP8_SCALES, *FP8_OTHERS)
        self._names = {name for name in own if not name.endswith(hidden) and name != "scaled_fp8"}
        self.scaled = any(name.endswith(FP8_SCALES) for name in own)
        self._finite = set(self.nf4) if trusted else set()

    def _state(self, key: str) -> State:
        name = key.removesuffix(NF4_STATE)
        try:
            said: dict[str, Any] = json.loads(bytes(self.raw.read(self.prefix + key).tolist()))
            kind, block = said["quant_type"], said["blocksize"]
            n, k = (int(size) for size in said["shape"])
            nested = None
            if f"{self.prefix}{name}.nested_absmax" in self.raw:
                nested = int(said["nested_blocksize"]), float(said["nested_offset"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(name, f"does not say how it was quantized ({error!r}). {AGAIN}") from error
        if (kind, block) != ("nf4", BLOCK):
            raise self._error(
                name,
                f"is {kind} with blocks of {block}; Vortex reads nf4 with blocks of {BLOCK}. Use such a file, or bf16.",
            )
        if n < 1 or k < 1 or k % BLOCK or (nested and (nested[0] < 1 or not math.isfinite(nested[1]))):
            raise self._error(name, f"is {n} x {k} in NF4, nested {nested}, which cannot be. {AGAIN}")
        return State(n, k, nested)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> Iterable[str]:
        """Every logical tensor's name."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape."""
        state = self.nf4.get(name)
        return (state.n, state.k) if state else self.raw.shape(self.prefix + name)

    def nbytes(self, name: str) -> int:
        """Bytes in the file, scales included; what progress is counted in."""
        whole = self.prefix + name
        stored = (whole, f"{whole}.absmax") if name in self.nf4 else (whole,)
        return sum(self.raw.nbytes(part) for part in stored if part in self.raw)

    def check(self, name: str, *, scales: bool = True) -> None:
        """Compare the types and sizes that make one tensor, from headers; with `scales`, that an NF4 one's are finite.

        Raises `VortexCheckpointError` naming the tensor.
        """
        state = self.nf4.get(name)
        if state is not None:
            self._check_nf4(name, state)
            if scales and name not in self._finite:
                self._check_scales(name, state)
                self._finite.add(name)
        elif not isinstance(self.raw, GgufFile):  # which tried every type it holds when it was opened
            self._expect(name, FLOATS)
            scale = self._scale_name(name)
            if scale is not None:
                self._expect(scale, SCALES)
                values = math.prod(self.raw.shape(self.prefix + scale))
                if values not in (1, self.shape(name)[0]):
                    raise self._error(scale, f"holds {values} values, neither one nor one a row. {AGAIN}")

    def _check_nf4(self, name: str, state: State) -> None:
        blocks = state.n * state.k // BLOCK
        self._expect(name, ("U8",), state.n * state.k // 2)
        self._expect(f"{name}.quant_map", SCALES, len(LEVELS))
        if state.nested is None:
            self._expect(f"{name}.absmax", SCALES, blocks)
        else:
            self._expect(f"{name}.absmax", ("U8",), blocks)
            self._expect(f"{name}.nested_absmax", SCALES, -(-blocks // state.nested[0]))
            self._expect(f"{name}.nested_quant_map", SCALES, 256)

    def _check_scales(self, name: str, state: State) -> None:
        scale = f"{name}.absmax" if state.nested is None else f"{name}.nested_absmax"
        if not bool(self.raw.read(self.prefix + scale).isfinite().all()):
            raise self._error(scale, f"holds NaN or infinite values. {AGAIN}")
        levels = self.raw.read(f"{self.prefix}{name}.quant_map").float().view(-1)
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

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor in 16 or 32 bits on `device`, decoded there."""
        if name in self.nf4:
            return dequantize(self.read_nf4(name, device), torch.float32)
        tensor = self.raw.read(self.prefix + name, device)
        if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = self._scale_name(name)
            if scale is None:
                return tensor.to(torch.bfloat16)  # fp8 fits bf16 exactly; a scaled value does not
            factor = self.raw.read(self.prefix + scale, device).float()
            return tensor.float() * factor.view(-1, *[1] * (tensor.ndim - 1))
        return tensor

    def _scale_name(self, name: str) -> str | None:
        stem = name.removesuffix(".weight")
        return next((stem + suffix for suffix in FP8_SCALES if self.prefix + stem + suffix in self.raw), None)

    def read_nf4(self, name: str, device: torch.device = CPU) -> NF4Weight:
        """The packed weight on `device`, un-nested there; only where `is_nf4`."""
        state, whole = self.nf4[name], self.prefix + name
        absmax = self.raw.read(f"{whole}.absmax", device)
        if state.nested is not None:
            block, offset = state.nested
            levels = self.raw.read(f"{whole}.nested_quant_map", device)
            scales = self.raw.read(f"{whole}.nested_absmax", device).repeat_interleave(block)
            absmax = levels[absmax.view(-1).int()] * scales[: absmax.numel()] + offset
        packed = self.raw.read(whole, device).view(state.n, state.k // 2)
        return NF4Weight(packed, absmax.float().view(state.n, state.k // BLOCK))


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
        return shapes[0] if len(shapes) == 1 else (sum(math.prod(shape[:1]) for shape in shapes), *shapes[0][1:])

    def nbytes(self, name: str) -> int:
        """Bytes in the file, about."""
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
        """Whether all of the tensor is stored in NF4."""
        return all(self._source.is_nf4(part) for part in self._sources(name))

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """The joined tensor."""
        parts = [self._source.read(part, device) for part in self._sources(name)]
        if name.startswith(self._swapped):
            parts = [*torch.cat(parts).chunk(2)[::-1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_nf4(self, name: str, device: torch.device = CPU) -> NF4Weight:
        """The joined packed weight, bit for bit; only where `is_nf4`."""
        packed = [self._source.read_nf4(part, device) for part in self._sources(name)]
        if name.startswith(self._swapped):
            packed = [*join(packed).halves()[::-1]]
        return packed[0] if len(packed) == 1 else join(packed)
