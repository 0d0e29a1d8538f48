"""A terminal that shows foreign text as plain text: no markup, no emoji codes, no escape sequences.

Styled text is a `rich.text.Text`. Every plain `str` goes through `printable`.
"""

from __future__ import annotations

from typing import Any

from rich import console, progress, table
from rich.text import Text

from ..utils.printable import printable


def plain(value: Any) -> Any:
    """A `str` as text that is safe to show; any other value as it is."""
    return Text(printable(value)) if isinstance(value, str) else value


class Console(console.Console):
    """Prints sentences without breaking their lines, tables in columns."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def say(self, *parts: str | tuple[str, str], style: str = "") -> None:
        """A sentence; a part may be `(text, style)`."""
        safe = [printable(part) if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts]
        super().print(Text.assemble(*safe, style=style), soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """Rich's own, for tables and texts."""
        super().print(*map(plain, objects), **options)

    def on_broken_pipe(self) -> None:
        """Raise: the caller of the command handles it."""
        raise


class Grid(table.Table):
    """A table in the style of all commands."""

    def __init__(self, *columns: str, title: str = "") -> None:
        super().__init__(*columns, title=plain(title) or None, title_justify="left", box=None, pad_edge=False)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(plain, cells), **options)


class Bars(progress.Progress):
    """Bars with a description, a `count` field and the time that passed."""

    def __init__(self, where: console.Console) -> None:
        super().__init__(
            progress.TextColumn("{task.description:>8}", markup=False),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[count]}", markup=False),
            progress.TimeElapsedColumn(),
            console=where,
        )
