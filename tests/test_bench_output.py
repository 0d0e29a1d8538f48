"""What a benchmark writes where plots cannot be made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vortex_core.bench import output


def test_figures_are_written_whether_or_not_there_are_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output.write_folder(tmp_path / "broken", {"a": 1}, lambda: {"plot": 1 / 0})  # type: ignore[dict-item]
    monkeypatch.setattr(output, "missing", lambda module: "does not import (no such file)")
    output.write_folder(tmp_path / "missing", {"a": 1}, lambda: pytest.fail("plots without matplotlib"))
    for name in ("broken", "missing"):
        assert json.loads((tmp_path / name / "report.json").read_text()) == {"a": 1}
    said = " ".join(capsys.readouterr().err.split())
    assert "No plots: matplotlib does not draw (division by zero)." in said
    assert "No plots: matplotlib does not import (no such file)." in said
