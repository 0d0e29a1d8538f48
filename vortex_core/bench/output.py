"""What benchmark commands show and write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import write
from ..terminal import err
from ..terminal import grid as grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..console import Bars


def picture_count(progress: Bars, what: str) -> Callable[[int, int], None]:
    """A new bar that counts pictures: `report(done, total)`."""
    task = progress.add_task(what, total=None, count="")

    def report(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, count=f"{done}/{total} pictures")

    return report


def write_folder(folder: Path, figures: Mapping[str, Any], plots: Mapping[str, Figure]) -> None:
    """Write report.json and the plots, `NAME.png` and `NAME.svg`."""
    from .figures import save

    folder.mkdir(parents=True, exist_ok=True)
    report = homeless(json.dumps(figures, indent=1)) + "\n"
    write(folder / "report.json", report.encode(), replace=True)
    for name, figure in plots.items():
        save(figure, folder / name)
    err().say((str(folder), "green"), f"  {', '.join(['report.json', *(f'{name}.png, .svg' for name in plots)])}")


def homeless(report: str) -> str:
    """JSON without the user's name in paths: reports are shown to others."""
    home = os.path.expanduser("~")
    return report if home in ("~", "/") else report.replace(json.dumps(home)[1:-1] + "/", "~/")


def milliseconds(seconds: float) -> str:
    """Seconds, as they are read."""
    return f"{seconds * 1e3:.1f} ms"
