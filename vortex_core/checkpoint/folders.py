"""The files of one model in a folder: whole, or in shards with or without an index; other files may lie beside them.

All functions raise `VortexCheckpointError`, with the name, where a file is missing or left from another download.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import VortexCheckpointError, quoted
from ..storage.files import PICKLES, SAFETENSORS, SafetensorsFiles, pickle_message, unreadable

SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})$")
INDEX = re.compile(r"(.+)\.safetensors\.index(\.[^.]+)?\.json$", re.IGNORECASE)
LONGEST = 16 * 2**20  # bytes of an index


def open_folder(folder: Path) -> SafetensorsFiles:
    """The weights in a model's subfolder; an index names the shards. Hidden files, such as macOS' `._`, are skipped."""
    if not folder.is_dir():
        raise VortexCheckpointError(f"Expected a folder at {folder}; there is none.", path=str(folder))
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, "model", error) from error
    indices = [path for path in files if INDEX.match(path.name)]
    if indices:
        return open_index(min(indices, key=lambda path: len(path.name)))  # variants have longer names
    weights = _plain([path for path in files if path.suffix.lower() in SAFETENSORS])
    if not weights:
        pickles = [path for path in files if path.suffix.lower() in PICKLES]
        if pickles:
            raise VortexCheckpointError(pickle_message(pickles[0]), path=str(pickles[0]))
        raise VortexCheckpointError(
            f"{folder} holds no .safetensors file. Download the model's weights into it.", path=str(folder)
        )
    _check_shards(folder, weights)
    return _opened(folder, weights)


def open_index(index: Path) -> SafetensorsFiles:
    """The shards that an index names, without other files beside them."""
    places = _indexed(index)
    opened = _opened(index.parent, [index.parent / name for name in sorted(set(places.values()))], "its index names")
    for tensor, name in places.items():
        if tensor not in opened or opened.file_of(tensor).name != name:
            raise VortexCheckpointError(
                f"{index.parent / name} does not hold {quoted(tensor)}, which {index.name} says it does. One of them "
                "is of another download; run it again.",
                path=str(index),
            )
    return opened


def whole_of(path: Path) -> SafetensorsFiles | None:
    """The whole model, if a file is one shard of it or its index; None for a file that is a model itself."""
    if INDEX.match(path.name):
        return open_index(path)
    if SHARD.match(path.stem) is None or path.suffix.lower() not in SAFETENSORS:
        return None
    family = _family(path)
    try:
        beside = sorted(other for other in path.parent.iterdir() if not other.name.startswith("."))
    except OSError as error:
        raise unreadable(path.parent, "model", error) from error
    shards = [other for other in beside if _family(other) == family]
    _check_shards(path.parent, shards)
    return _opened(path.parent, shards)


def _family(path: Path) -> tuple[str, str] | None:
    """What all shards of a model share: their name, and how many there should be."""
    found = SHARD.match(path.stem)
    return (found[1], found[3]) if found and path.suffix.lower() in SAFETENSORS else None


def _plain(weights: Sequence[Path]) -> list[Path]:
    """`weights` without variants, such as `model.fp16` beside `model`."""

    def stem(path: Path) -> str:
        found = SHARD.match(path.stem)
        return found[1] if found else path.stem

    stems = {stem(path) for path in weights}
    return [path for path in weights if stem(path).rpartition(".")[0] not in stems]


def _check_shards(folder: Path, weights: Iterable[Path]) -> None:
    splits: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in weights:
        found = SHARD.match(path.stem)
        if found:
            splits[found[1]][found[3]].add(int(found[2]))
    for name, counts in splits.items():
        if len(counts) > 1:
            raise VortexCheckpointError(
                f"{folder} holds shards of several splits of {name}: {', '.join(f'of {count}' for count in counts)}. "
                "Remove those that are left from another download.",
                path=str(folder),
            )
        for count, numbers in counts.items():
            lacking = [number for number in range(1, min(int(count), 10_000) + 1) if number not in numbers]
            if lacking or len(numbers) != int(count):
                example = f"{name}-{(lacking or [0])[0]:0{len(count)}}-of-{count}.safetensors"
                raise VortexCheckpointError(
                    f"{folder} holds {len(numbers)} of {int(count)} shards of {name}; {example} is missing. "
                    "The download is incomplete; run it again.",
                    path=str(folder),
                )


def _opened(folder: Path, weights: Sequence[Path], why: str = "is a link to nothing, or no file") -> SafetensorsFiles:
    missing = [path.name[:200] for path in weights if not os.path.isfile(path)]  # no name makes it raise
    if missing:
        raise VortexCheckpointError(
            f"{folder} lacks {', '.join(missing[:3])}, which {why}. The download is incomplete; run it again.",
            path=str(folder),
        )
    return SafetensorsFiles(folder, weights, steady=True)


def _indexed(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > LONGEST:
            raise ValueError(f"it has {index.stat().st_size / 1e6:.0f} MB")
        places = json.loads(index.read_bytes())["weight_map"]
        names = set(places.values())
        outside = [name for name in names if Path(name).name != name]
    except OSError as error:
        raise unreadable(index, "index", error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VortexCheckpointError(
            f"{index} is not an index of shards ({error!r}). Download it again.", path=str(index)
        ) from error
    if outside or not names:
        raise VortexCheckpointError(
            f"{index} names {quoted(outside[0]) if outside else 'no file'}, which is not a file beside it. Download "
            "the model again.",
            path=str(index),
        )
    return dict(places)
