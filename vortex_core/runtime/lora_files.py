"""The LoRAs that a caller names, read. A file is read again only when it has changed, or after several others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from ..checkpoint.lora_reader import read_lora
from ..errors import VortexInputError, quoted
from ..flux1.spec import ModelSpec
from ..quant.adapters import LoraFile
from ..utils.numeric import finite
from ..utils.paths import expanded
from .loras import MOST, Chosen

KEPT = 6  # files, of some 0.2 GB of host memory each at full size
STRONGEST = 100.0
Pairs = Iterable[tuple[str | Path | LoraFile, float]]  # files, or what was read of one, and strengths


class LoraFiles:
    """Reads LoRAs for models of one `spec`. Any thread may use it."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec, self._lock = spec, Lock()
        self._read: OrderedDict[tuple[str, int, int], LoraFile] = OrderedDict()

    def choose(self, loras: object) -> Chosen:
        """`loras`: pairs of a path and a strength. Raises `VortexInputError` and `VortexCheckpointError`."""
        if isinstance(loras, str | bytes | Path) or not isinstance(loras, Iterable):
            raise VortexInputError(f"loras is a list of pairs (path, strength), not {quoted(loras)}.")
        pairs = [_checked(one) for one in loras]
        if len(pairs) > MOST:
            raise VortexInputError(f"{len(pairs)} LoRAs are too many at once; {MOST} are the most.")
        with self._lock:
            chosen = tuple((self._file(one), strength) for one, strength in pairs)
            while len(self._read) > max(KEPT, len(pairs)):
                self._read.popitem(last=False)
        return chosen

    def of_call(self, loras: Pairs | None, otherwise: Chosen) -> Chosen:
        """Those that a call names; `otherwise` if it names none. Raises as `choose`."""
        return otherwise if loras is None else self.choose(loras)

    def forget(self) -> Chosen:
        """Drop what was read; no LoRA."""
        with self._lock:
            self._read.clear()
        return ()

    def _file(self, path: Path | LoraFile) -> LoraFile:
        if isinstance(path, LoraFile):
            return path
        try:
            found = path.stat()
        except OSError:
            return read_lora(path, self._spec)  # which says what is wrong
        key = str(path.resolve()), found.st_size, found.st_mtime_ns
        if key not in self._read:
            self._read[key] = read_lora(path, self._spec)
        self._read.move_to_end(key)
        return self._read[key]


def check_pair(one: object) -> tuple[Path, float]:
    """A path and a strength. Raises `VortexInputError` for anything else."""
    if not isinstance(one, tuple | list) or len(one) != 2 or not isinstance(one[0], str | Path):
        raise VortexInputError(f"Each of loras is a pair of a path and a strength, not {quoted(one)}.")
    return expanded(one[0]), _strength(one[1])


def _checked(one: object) -> tuple[Path | LoraFile, float]:
    """The same, and what was read already."""
    if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], LoraFile):
        return one[0], _strength(one[1])
    return check_pair(one)


def _strength(given: object) -> float:
    strength = finite(given)
    if strength is None or abs(strength) > STRONGEST:
        raise VortexInputError(
            f"The strength of a LoRA is a number from {-STRONGEST:g} to {STRONGEST:g}, not {quoted(given)}."
        )
    return strength
