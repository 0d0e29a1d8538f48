"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import VortexInputError, quoted


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading `~` or `~user` replaced by that home folder.

    Raises `VortexInputError` for a user or a home that does not exist, and for what no path can be.
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
