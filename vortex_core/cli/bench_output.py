"""What the benchmark commands show and write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.packages import first_line, missing, remedy
from ..utils.whole_files import write
from .terminal import err

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .console import Bars


def picture_count(progress: Bars, what: str) -> Callable[[int, int], None]:
    """A new bar that counts pictures: `report(done, total)`."""
    task = progress.add_task(what, total=None, count="")

    def report(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, count=f"{done}/{total} pictures")

    return report


def write_folder(folder: Path, figures: Mapping[str, Any], plots: Callable[[], Mapping[str, Figure]]) -> None:
    """Write report.json and what `plots` makes, `NAME.png` and `NAME.svg`; without plots where matplotlib fails."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "report.json", (homeless(json.dumps(figures, indent=1)) + "\n").encode(), replace=True)
    written = ["report.json"]
    why = missing("matplotlib.figure")
    if why is None:
        from ..bench.plot_style import save

        try:
            for name, figure in plots().items():
                save(figure, folder / name)
                written.append(f"{name}.png, .svg")
        except Exception as error:  # the figures themselves are written already
            why = f"does not draw ({first_line(error)})"
    err().say((str(folder), "green"), f"  {', '.join(written)}")
    if why is not None:
        err().say(f"No plots: matplotlib {why}. Try `{remedy('matplotlib')}`.")


def homeless(report: str) -> str:
    """JSON with `~` for the user's home folder: reports are shown to others."""
    home = os.path.expanduser("~")
    return report if home in ("~", "/") else report.replace(json.dumps(home)[1:-1] + "/", "~/")
