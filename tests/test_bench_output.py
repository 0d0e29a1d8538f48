"""What a benchmark writes where plots cannot be made, or the disk is full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_disk import file_size_limit

from vortex_core.bench import exports, plot_style
from vortex_core.cli import bench_output


def test_figures_are_written_whether_or_not_there_are_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_output.write_folder(tmp_path / "broken", {"a": 1}, lambda: {"plot": 1 / 0})  # type: ignore[dict-item]
    monkeypatch.setattr(bench_output, "missing", lambda module: "does not import (no such file)")
    bench_output.write_folder(tmp_path / "missing", {"a": 1}, lambda: pytest.fail("plots without matplotlib"))
    for name in ("broken", "missing"):
        assert json.loads((tmp_path / name / "report.json").read_text()) == {"a": 1}
    said = " ".join(capsys.readouterr().err.split())
    assert "No plots: matplotlib does not draw (division by zero)." in said
    assert "No plots: matplotlib does not import (no such file)." in said


def save_plot(path: Path) -> None:
    plot_style.save(plot_style.timeline("x", {"a": [(0.0, 1.0), (1.0, 2.0)]}), path.with_suffix(""))


def save_table(path: Path) -> None:
    exports.write_csv([], path)


def save_metrics(path: Path) -> None:
    exports.write_prometheus([("a", {"b": "c" * 100}, 1.0)], "gauge", "x", path)


@pytest.mark.parametrize(
    ("save", "names"),
    [(save_plot, ["x.png", "x.svg"]), (save_table, ["x.csv"]), (save_metrics, ["x.prom"])],
)
def test_a_full_disk_costs_no_earlier_file(tmp_path: Path, save: Callable[[Path], None], names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("of an earlier run")
    with file_size_limit(50), pytest.raises(OSError, match="too large"):
        save(tmp_path / names[0])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "of an earlier run")
    save(tmp_path / names[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.read_bytes() != b"of an earlier run" for path in tmp_path.iterdir())
