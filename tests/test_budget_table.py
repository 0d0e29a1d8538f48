"""The README's tables of the VRAM budget, from rows as tools/vram_contract.py writes them."""

from pathlib import Path
from typing import Any

import pytest
from budget_table import BEGIN, END, insert, tables


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


def test_the_readme_has_their_place() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    once = insert(text, "figures")
    assert f"{BEGIN}\nfigures\n{END}" in once
    assert insert(once, "figures") == once
    with pytest.raises(ValueError, match="not both there"):
        insert(text.replace(END, ""), "figures")
