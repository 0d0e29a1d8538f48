"""Writes the tables of memory and speed in README.md and docs, so that a figure is the same on each page.

    python tools/benchmarks/budget_table.py                  # what is planned, and what docs/reports/speed* measured
    python tools/benchmarks/budget_table.py contract*.json   # also what tools/benchmarks/vram_contract.py measured
    python tools/benchmarks/budget_table.py contract*.json --print

A page has a pair of marks for each table: `<!-- table: NAME -->` and `<!-- /table -->`. The names:
`budget measured` (needs the files of tools/benchmarks/vram_contract.py), `budget planned`, `speed`, `speed in short`,
`goals`, `parts`, `both allocators`, `predicted` and `predicted and measured`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
GB = 1e9
PAGES = ("README.md", "docs/vram.md", "docs/performance.md")
MEASURED, PLANNED, SPEED, SHORT = "budget measured", "budget planned", "speed", "speed in short"
GOALS, PARTS, BOTH = "goals", "parts", "both allocators"
PREDICTED, CHECKED = "predicted", "predicted and measured"
REPORTS = {"native": "speed", "cudaMallocAsync": "speed-async"}  # below docs/reports, by torch's allocator
BUDGETS = (11.0, 6.5, 5.5, 4.5)  # GB, of the planned table
SIDE = 1024  # pixels, of the planned table
SIDES = (512, 1024)  # of the predicted tables
CARDS = ("RTX 3060", "RTX 4070")  # of the predicted table
PCIE = 12e9  # bytes a second, of the planned table
CONTENDERS = {
    "Vortex fast": "**Vortex `fast`**",
    "Vortex exact": "Vortex `exact`",
    "diffusers, bitsandbytes NF4, CUDA graph": "diffusers + bitsandbytes NF4, in a CUDA graph",
    "diffusers, bitsandbytes NF4, compiled blocks": "diffusers + bitsandbytes NF4, compiled blocks",
    "diffusers, bitsandbytes NF4": "diffusers + bitsandbytes NF4",
    "diffusers, 16 bits, compiled blocks": "diffusers, 16 bits, compiled blocks",
    "ComfyUI core, 16 bits": "ComfyUI's core, 16 bits, with diffusers' VAE",
    "diffusers, 16 bits": "diffusers, 16 bits",
}  # names in the report, and on the pages
IN_SHORT = ("Vortex fast", "Vortex exact", "diffusers, bitsandbytes NF4", "ComfyUI core, 16 bits")
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
    """A line for each placement with a predicted peak. Those of the grid count only for the extremes."""
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
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def gb(size: int | None) -> str:
    """Bytes as text in GB."""
    return "unknown" if size is None else f"{size / GB:.2f} GB"


def planned() -> str:
    """What streams at some budgets, and what that costs, as `vortex plan` says without a card."""
    from vortex_core.cli.plan_report import propose

    lines = []
    for budget in BUDGETS:
        made = propose(budget, SIDE, SIDE, 1, None, {})
        added = made.costs(PCIE, 0)
        streamed = {row.name: row.streamed for row in made.rows if row.streamed}
        blocks = streamed.pop("step-time blocks", 0)
        names = [name for name in ("T5", "CLIP", "modulation") if name in streamed]
        words = ", ".join([*names, f"{gb(blocks)} of blocks"] if blocks else names) or "nothing"
        times = (f"{added[name]:.0f} ms" for name in ("prompt_ms", "picture_ms"))
        lines.append((f"{budget:g} GB", words, gb(made.plan.hosted), *times))
    return table(("budget", "streams", "pinned host memory", "adds to a new prompt", "adds to a picture"), lines)


def speed(report: Row, contenders: Iterable[str] = CONTENDERS) -> str:
    """Medians and peaks of tools/benchmarks/speed_contract.py's report, a line for each contender."""
    lines = []
    for name in contenders:
        rows = sorted((row for row in report["rows"] if row["contender"] == name), key=lambda row: int(row["height"]))
        peak = " / ".join(f"{row['peak'] / GB:.1f}" for row in rows)
        lines.append((CONTENDERS[name], peak, *(f"{median(row) * 1e3:.0f} ms" for row in rows)))
    return table(("", "peak at 512 / 1024, GB", "512 x 512", "1024 x 1024"), lines)


def median(row: Row, part: str = "picture") -> float:
    """Seconds of a picture, or of a part of it."""
    return next(float(found["seconds"]) for found in row[part]["percentiles"] if found["q"] == 50)


def goals(reports: dict[str, Row]) -> str:
    """The promises that are broken in one of these reports, by allocator, and how many of all hold."""
    judged = {name: {row["promise"]: row for row in report["promises"]} for name, report in reports.items()}
    lines = []
    for promise in next(iter(judged.values())):
        rows = [found[promise] for found in judged.values()]
        if not all(row["holds"] for row in rows):
            most = (rows[0]["found"] <= rows[0]["wanted"]) == rows[0]["holds"]
            goal = f"{'at most' if most else 'at least'} {rows[0]['wanted']:g}"
            lines.append((promise, goal, *(figure(row["found"]) + ", reached" * row["holds"] for row in rows)))
    held = (f"{sum(row['holds'] for row in found.values())} of {len(found)} ({name})" for name, found in judged.items())
    return table(("not reached", "goal", *judged), lines) + f"\n\nPromises that hold: {', '.join(held)}."


def parts(reports: dict[str, Row]) -> str:
    """The parts of a picture's time, and what comes on top of it, in both modes."""

    def both(promise: str, form: str) -> list[str]:  # a promise's figure in `fast` and in `exact`
        return [
            " / ".join(form.format(kept(report, mode + promise)) for mode in ("fast", "exact"))
            for report in reports.values()
        ]

    def fast(part: str, times: int) -> list[str]:  # milliseconds of a part of a picture in `fast`, at both sizes
        rows = ([row for row in report["rows"] if row["contender"] == "Vortex fast"] for report in reports.values())
        return [" / ".join(f"{median(row, part) * times * 1e3:.0f} ms" for row in found) for found in rows]

    return table(
        ("", *reports),
        [
            ("the 4 steps of a `fast` picture, 512 / 1024", *fast("step", 4)),
            ("decoding it", *fast("decode", 1)),
            ("a new prompt adds, `fast` / `exact`", *both(": a new prompt adds", "{:.0f} ms")),
            ("a batch of 4 against one picture", *both(" 512: batch 4", "{:.2f} times")),
            ("P99 over P50 of 30 pictures", *both(" 512: P99", "{:.3f}")),
            ("the first picture of a process, over the second", *both(": first picture", "{:.1f} s")),
        ],
    )


def both_allocators(reports: dict[str, Row]) -> str:
    """Medians of Vortex under each allocator, and the second over the first."""
    sides = ("512", "1024")
    lines = []
    for mode in ("fast", "exact"):
        cells = [f"`{mode}`"]
        for side in sides:
            times = [
                median(row) * 1e3
                for report in reports.values()
                for row in report["rows"]
                if (row["contender"], str(row["height"])) == (f"Vortex {mode}", side)
            ]
            cells += [*(f"{found:.1f} ms" for found in times), f"{times[1] / times[0]:.3f}"]
        lines.append(cells)
    return table(("", *(f"{side}, {what}" for side in sides for what in (*reports, "ratio"))), lines)


def predicted() -> str:
    """What `vortex plan --card` predicts, by part, in seconds."""
    from vortex_core.bench.cards import get
    from vortex_core.bench.roofline import PICTURE, predict
    from vortex_core.flux1.spec import ModelSpec

    lines = []
    for name in CARDS:
        for side in SIDES:
            for precision in ("int8", "exact"):
                found = predict(get(name), ModelSpec(), side, side, precision)
                times = [found.parts[part].seconds for part in PICTURE]
                cells = [f"{seconds:.2f}" for seconds in (*times, found.picture.seconds, found.picture.floor)]
                cells[-2] = f"**{cells[-2]}**"
                lines.append((name, str(side), f"`{precision}`", *cells))
    head = ("predicted, seconds", "size", "precision", *PICTURE, "a picture", "at full rates")
    return table(head, lines)


def checked(report: Row) -> str:
    """The same prediction for the card of a report, beside what was measured."""
    from vortex_core.bench.cards import get
    from vortex_core.bench.roofline import predict
    from vortex_core.flux1.spec import ModelSpec

    card, lines = get(report["machine"]["device"]), []
    for mode, precision in (("fast", "fp8"), ("exact", "exact")):
        for side in SIDES:
            rows = (row for row in report["rows"] if row["contender"] == f"Vortex {mode}")
            took = median(next(row for row in rows if int(row["height"]) == side))
            seconds = predict(card, ModelSpec(), side, side, precision).picture.seconds
            cells = (f"{seconds * 1e3:.0f} ms", f"{took * 1e3:.0f} ms", f"{seconds / took:.2f}")
            lines.append((f"{card.name}, {side}, `{precision}`", *cells))
    return table(("a picture", "predicted", "measured", "ratio"), lines)


def kept(report: Row, start: str) -> float:
    """The finding for the promise that starts so."""
    return next(float(row["found"]) for row in report["promises"] if row["promise"].startswith(start))


def figure(found: float) -> str:
    """A promise's figure with its unit, as the pages show it."""
    return f"{found:.1f}" if found >= 10 else f"{found:.3g}"


def made_here() -> dict[str, str]:
    """The tables that need no GPU, by name."""
    reports = {
        name: json.loads((ROOT / "docs/reports" / folder / "report.json").read_text())
        for name, folder in REPORTS.items()
    }
    native = reports["native"]
    return {
        PLANNED: planned(),
        SPEED: speed(native),
        SHORT: speed(native, IN_SHORT),
        GOALS: goals(reports),
        PARTS: parts(reports),
        BOTH: both_allocators(reports),
        PREDICTED: predicted(),
        CHECKED: checked(native),
    }


def insert(text: str, name: str, found: str) -> str:
    """`text` with a new table between the marks of `name`. Raises `ValueError` if it has no such marks."""
    begin, end = f"<!-- table: {name} -->", "<!-- /table -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{begin} and {end} are not both there")
    return f"{before}{begin}\n{found}\n{end}{after}"


def main() -> None:
    """Parse arguments, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="*", help="what vram_contract.py --json wrote")
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args()
    made = made_here()
    if arguments.figures:
        made[MEASURED] = tables([row for path in arguments.figures for row in json.loads(path.read_text())])
    if arguments.print:
        print("\n\n".join(f"{name}\n\n{found}" for name, found in made.items()))
        return
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        for name, found in made.items():
            if f"<!-- table: {name} -->" in text:
                text = insert(text, name, found)
        path.write_text(text)


if __name__ == "__main__":
    main()
