"""What tools/vram_contract.py measured, as the tables in README.md.

python tools/budget_table.py contract*.json                  # prints them
python tools/budget_table.py contract*.json --into README.md # between the two marks there
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

GB = 1e9
BEGIN, END = "<!-- measured: tools/budget_table.py -->", "<!-- /measured -->"
Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """The machine, how many promises hold and which do not, peaks against predictions, times."""
    judged = [row for row in rows if row["holds"] is not None]
    broken = [f"- broken: {row['promise']}: {row['found']}" for row in judged if not row["holds"]]
    machines = sorted({row["found"] for row in rows if row["promise"] == "measured on"})
    held = f"{len(judged) - len(broken)} of {len(judged)} promises hold."
    parts = [". ".join([*machines, held]), "\n".join(broken), peaks(rows), times(rows)]
    return "\n\n".join(part for part in parts if part)


def peaks(rows: Iterable[Row]) -> str:
    """A line for each placement whose peak was predicted; those of the grid count for the extremes only."""
    found = [row for row in rows if "predicted" in row]
    lines = []
    for row in found:
        if row["section"] != "grid":
            budget = f"{row['budget']:g} GB" + (f", {row['card']:g} GB card" if "card" in row else "")
            size = f"{row['size']}, {row['batch']} at once" if row["batch"] > 1 else row["size"]
            lines.append((budget, size, *(gb(row[name]) for name in ("predicted", "reserved", "process", "hosted"))))
    if not lines:
        return ""
    off = [row["predicted"] / row["reserved"] - 1 for row in found]
    head = ("budget", "size", "predicted peak", "torch reserved, peak", "process (NVML), peak", "in host memory")
    return table(head, lines) + f"\n\nPredicted peaks over {len(off)} cases: {min(off):+.1%} to {max(off):+.1%}."


def times(rows: Iterable[Row]) -> str:
    """A line for each budget that was timed."""
    found: dict[float, dict[str, str]] = {}
    for row in rows:
        if "ms" in row:
            found.setdefault(row["budget"], {})[row["what"]] = f"{row['ms']:.0f} ms"
    columns = sorted({what for timed in found.values() for what in timed}, reverse=True)
    lines = [(f"{budget:g} GB", *(timed.get(what, "") for what in columns)) for budget, timed in found.items()]
    return table(("budget", *columns), lines) if lines else ""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def gb(size: int | None) -> str:
    """Bytes, as they are read."""
    return "unknown" if size is None else f"{size / GB:.2f} GB"


def insert(text: str, found: str) -> str:
    """`text` with what is between its marks replaced. Raises `ValueError` where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN} and {END} are not both there")
    return f"{before}{begin}\n{found}\n{end}{after}"


def main() -> None:
    """Parse arguments, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="+", help="what vram_contract.py --json wrote")
    parser.add_argument("--into", type=Path, help="a Markdown file with the marks")
    arguments = parser.parse_args()
    found = tables([row for path in arguments.figures for row in json.loads(path.read_text())])
    if arguments.into is None:
        print(found)
    else:
        arguments.into.write_text(insert(arguments.into.read_text(), found))


if __name__ == "__main__":
    main()
