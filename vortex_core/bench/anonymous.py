"""Takes paths and names of people and machines out of texts, which errors and drivers put there."""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

PATH, NAME = "(a path)", "(a name)"
# an absolute path, or one below a home folder; not a fraction, nor a unit such as GB/s
_PATHS = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[\\/]+[^\s'\"<>|:;,()]+")


def anonymous(value: Any) -> Any:
    """`value`, as JSON has it, with `(a path)` and `(a name)` in its texts. Keys stay."""
    return _cleaned(value, tuple(_folders()), tuple(_names()))


def _cleaned(value: Any, folders: tuple[str, ...], names: tuple[str, ...]) -> Any:
    again = partial(_cleaned, folders=folders, names=names)
    if isinstance(value, dict):
        return {key: again(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [again(item) for item in value]
    if not isinstance(value, str):
        return value
    for folder in folders:  # first: they may have blanks in them
        value = value.replace(folder, "~").replace(folder.replace("\\", "\\\\"), "~")
    value = _PATHS.sub(PATH, value)
    for name in names:
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", NAME, value, flags=re.IGNORECASE)
    return value


def _folders() -> Iterator[str]:
    """The home folder and the working folder; the longer one first."""
    found = [os.path.expanduser("~")]
    with suppress(OSError):  # it was removed
        found.append(os.getcwd())
    yield from sorted((folder for folder in found if len(folder) > 1), key=len, reverse=True)


def _names() -> Iterator[str]:
    """Names of the user and of the machine."""
    with suppress(Exception):  # there is none, which is told by many kinds of errors
        yield getpass.getuser()
    home, host = os.path.basename(os.path.expanduser("~")), platform.node()
    yield from (name for name in (home, host, host.partition(".")[0]) if name and name != "~")
