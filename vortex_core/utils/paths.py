"""Paths as people write them, and the folders that Vortex keeps its own files in."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import VortexInputError, quoted


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home folder.

    Raises `VortexInputError` where there is no such user or home folder, and for a value that cannot be a path.
    """
    try:
        if path == "":
            raise VortexInputError("A path is expected, not an empty text.")
        made = Path(path)
        if "\0" in str(made):
            raise VortexInputError(f"{quoted(str(made))} holds a zero byte, which no path may.")
        return made.expanduser()
    except TypeError as error:
        raise VortexInputError(f"A path is expected, not {quoted(path)}.") from error
    except RuntimeError as error:
        raise VortexInputError(
            f"{quoted(str(path))} begins with the home folder of a user who has none here. Write the path out."
        ) from error


def user_folder(variable: str, bases: tuple[str, ...], default: str, name: str, advice: str) -> Path:
    """The folder `$variable`, else `name` in the first of `$bases` that is set, else in `default` in the home folder.

    Empty variables count as unset. Raises `VortexInputError`, with `advice` where the user has no home folder.
    """
    if named := os.environ.get(variable):
        return expanded(named)
    base = next(filter(None, map(os.environ.get, bases)), None)
    try:
        return (expanded(base) if base else Path.home() / default) / name
    except RuntimeError as error:
        raise VortexInputError(f"This user has no home folder{advice}") from error
