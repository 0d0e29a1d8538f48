"""Faults at each stage, once each. Many of each, and the table: `python tools/hardening/faults.py --help`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import faults
import micro_model
import pytest
import torch
import traps


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_model.write(tmp_path_factory.mktemp("micro") / "micro")


@pytest.mark.slow
def test_every_fault_is_told_and_the_next_picture_is_right(micro: Path) -> None:
    # in a process of its own: an error of CUDA's loses the device to all engines
    command = [sys.executable, faults.__file__, "--model", str(micro), "--times", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["faults"] > 60
    assert figures["broken"] == []
    assert figures["holds"]
    assert done.returncode == 0


def test_a_trap_springs_in_its_stage_alone() -> None:
    sprung = []
    with traps.trapped():
        with traps.Trap("step", 2, lambda: sprung.append(1)) as trap:
            torch.empty(3).copy_(torch.empty(3))  # not the code of a step
        assert trap.calls == 0
        with traps.Trap(None, 2, lambda: sprung.append(2), stays=True) as trap:
            for _ in range(3):
                torch.empty(3)
        assert (trap.calls, sprung) == (3, [2, 2])
    assert "copy_" not in vars(torch.Tensor) or torch.empty(1).copy_(torch.ones(1)) == 1


def test_a_fault_that_was_not_injected_counts_as_broken(tmp_path: Path) -> None:
    bench = faults.Bench.__new__(faults.Bench)
    bench.times, bench.rows, bench.device = 1, [], "cpu"
    bench.cache, bench.out = tmp_path / "cache", tmp_path / "out"
    bench.out.mkdir()
    bench.held = lambda: 0  # type: ignore[method-assign]
    bench.leftovers = lambda: [".a.part"]  # type: ignore[method-assign]
    bench.run("step", "exception", lambda row: None)
    (row,) = bench.rows
    assert row.wrong == ["NOT INJECTED", "left .a.part"]
    assert "| step | exception | 0 |" in faults.table([row])
