"""The tables of memory and speed in README.md and docs: how they are made, and that the pages have what is made."""

from pathlib import Path
from typing import Any

import pytest
from budget_table import MEASURED, PAGES, both_allocators, goals, insert, made_here, tables

ROOT = Path(__file__).parent.parent


def row(promise: str, holds: bool | None, **figures: Any) -> dict[str, Any]:
    return {"section": "default", "promise": promise, "found": "as found", "holds": holds, **figures}


ROWS = [
    row("measured on", None) | {"found": "a card"},
    row("6.5 GB: predicted", True, budget=6.5, size="1024 x 1024", batch=4, predicted=6_050_000_000)
    | {"reserved": 6_000_000_000, "process": None, "hosted": 4_600_000_000},
    row("12 GB card: predicted", False, budget=11, card=12, size="1024 x 1024", batch=1, predicted=10_680_000_000)
    | {"reserved": 10_800_000_000, "process": 11_400_000_000, "hosted": 0},
    row("11 GB: a new prompt, ms", None, budget=11, what="a new prompt", ms=40.4),
    row("11 GB: a picture at 512, ms", None, budget=11, what="a picture at 512", ms=250.0),
    row("4.5 GB: a picture at 512, ms", None, budget=4.5, what="a picture at 512", ms=310.6),
]


def test_promises_peaks_and_times_are_told() -> None:
    assert tables(ROWS).splitlines() == [
        "a card. 1 of 2 promises hold.",
        "",
        "- broken: 12 GB card: predicted: as found",
        "",
        "| budget | size | predicted peak | torch reserved, peak | process (NVML), peak | in host memory |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 6.5 GB | 1024 x 1024, 4 at once | 6.05 GB | 6.00 GB | unknown | 4.60 GB |",
        "| 11 GB, 12 GB card | 1024 x 1024 | 10.68 GB | 10.80 GB | 11.40 GB | 0.00 GB |",
        "",
        "Predicted peaks over 2 cases: -1.1% to +0.8%.",
        "",
        "| budget | a picture at 512 | a new prompt |",
        "| --- | --- | --- |",
        "| 11 GB | 250 ms | 40 ms |",
        "| 4.5 GB | 311 ms |  |",
    ]


def promise(name: str, found: float, wanted: float, holds: bool) -> dict[str, Any]:
    return {"promise": name, "found": found, "wanted": wanted, "holds": holds}


def test_a_goal_that_one_report_misses_is_told_as_not_reached() -> None:
    reports = {
        "native": {"promises": [promise("a", 2, 1, False), promise("b", 1, 2, False), promise("c", 1, 1, True)]},
        "other": {"promises": [promise("a", 0.5, 1, True), promise("b", 12.34, 2, True), promise("c", 1, 1, True)]},
    }
    assert goals(reports).splitlines() == [
        "| not reached | goal | native | other |",
        "| --- | --- | --- | --- |",
        "| a | at most 1 | 2 | 0.5, reached |",
        "| b | at least 2 | 1 | 12.3, reached |",
        "",
        "Promises that hold: 1 of 3 (native), 3 of 3 (other).",
    ]


def test_allocators_are_compared_by_mode_and_size() -> None:
    def report(factor: float) -> dict[str, Any]:
        times = {("fast", "1024"): 0.3, ("fast", "512"): 0.1, ("exact", "512"): 0.2, ("exact", "1024"): 0.5}
        return {
            "rows": [
                {"contender": f"Vortex {mode}", "height": side}
                | {"picture": {"percentiles": [{"q": 90, "seconds": 9.0}, {"q": 50, "seconds": seconds * factor}]}}
                for (mode, side), seconds in times.items()
            ]
        }

    assert both_allocators({"native": report(1), "other": report(0.9)}).splitlines()[2:] == [
        "| `fast` | 100.0 ms | 90.0 ms | 0.900 | 300.0 ms | 270.0 ms | 0.900 |",
        "| `exact` | 200.0 ms | 180.0 ms | 0.900 | 500.0 ms | 450.0 ms | 0.900 |",
    ]


def test_a_page_has_a_place_for_what_is_measured() -> None:
    text = (ROOT / "docs/vram.md").read_text()
    once = insert(text, MEASURED, "figures")
    assert f"<!-- table: {MEASURED} -->\nfigures\n<!-- /table -->" in once
    assert insert(once, MEASURED, "figures") == once
    with pytest.raises(ValueError, match="not both there"):
        insert(text, "nobody's", "figures")


def test_each_page_has_the_tables_that_are_made() -> None:
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    for name, found in made_here().items():
        places = [page for page, text in texts.items() if f"<!-- table: {name} -->" in text]
        assert places, f"no page has the table {name!r}"
        for page in places:
            told = f"{page} is not what `python tools/benchmarks/budget_table.py` writes"
            assert insert(texts[page], name, found) == texts[page], told
