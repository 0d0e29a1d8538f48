"""What benchmark commands show and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..packages import first_line, missing
from ..terminal import console
from .figures import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_count(progress: Progress, what: str) -> Callable[[int, int], None]:
    """A new bar that counts pictures: `report(done, total)`."""
    task = progress.add_task(what, total=None, count="")

    def report(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, count=f"{done}/{total} pictures")

    return report


def write_folder(folder: Path, figures: Mapping[str, Any], plots: Callable[[], Mapping[str, Figure]]) -> None:
    """Write report.json and what `plots` makes, `NAME.png` and `NAME.svg`; without plots where matplotlib fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    written = ["report.json"]
    why = missing("matplotlib.figure")
    if why is None:
        try:
            for name, figure in plots().items():
                save(figure, folder / name)
                written.append(f"{name}.png, .svg")
        except Exception as error:  # the figures are measured and written
            why = f"does not draw ({first_line(error)})"
    console.print(f"[green]{escape(str(folder))}[/]  {', '.join(written)}")
    if why is not None:
        console.print(f"No plots: matplotlib {why}. Try `pip install --upgrade matplotlib`.", markup=False)


def milliseconds(seconds: float) -> str:
    """Seconds, as they are read."""
    return f"{seconds * 1e3:.1f} ms"


def grid(*columns: str, title: str = "") -> Table:
    """An empty table in the style of all commands."""
    return Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False)
