"""Runs that later ones are compared with, kept by what must be equal for that: machine, model, size, steps, prompts.

One JSON-lines file for each such set of facts, one run a line, the oldest first: the file is the history.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import VortexError
from ..paths import expanded
from .latency_report import LatencyReport
from .machine import Machine
from .workload import Workload

SCHEMA = "vortex.bench.run/1"


@dataclass(frozen=True, slots=True)
class Run:
    """One run: `seconds` of its pictures with cached prompts. `baseline`: later runs are compared with it."""

    when: str
    vortex: str
    baseline: bool
    seconds: tuple[float, ...]
    phases: dict[str, float]  # medians


class History:
    """All runs in `folder` that can be compared with each other: those of the same facts.

    `folder` is by default `$VORTEX_BASELINES` or the user's data folder.
    """

    def __init__(self, folder: Path | None, machine: Machine, model: dict[str, str], workload: Workload) -> None:
        named = folder or os.environ.get("VORTEX_BASELINES")
        data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
        folder = expanded(named or Path(data, "vortex", "baselines"))
        work = asdict(workload)
        facts = {"model": model} | {key: work[key] for key in ("width", "height", "steps", "prompts")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"{machine.fingerprint}-{digest}.jsonl"

    def runs(self) -> list[Run]:
        """The oldest first. Raises `VortexError` for a file that is damaged."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines()
        return [_parse(line, f"{self.path}, line {i + 1}") for i, line in enumerate(lines)]

    def baseline(self) -> Run:
        """The latest run that was saved as a baseline. Raises `VortexError` where there is none."""
        found = next((run for run in reversed(self.runs()) if run.baseline), None)
        if found is None:
            raise VortexError(
                "There is no baseline for this machine, model, size and steps. Save one first: "
                f"vortex bench baseline save. Looked in {self.path}."
            )
        return found

    def add(self, report: LatencyReport, *, baseline: bool) -> None:
        """Keep a report's run."""
        series = report.series["cached"]
        run = Run(
            when=report.when,
            vortex=report.machine.vortex,
            baseline=baseline,
            seconds=tuple(sample.seconds for sample in report.samples if not sample.cold),
            phases={name: latency.percentile(50).seconds for name, latency in series.phases.items()},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"schema": SCHEMA} | asdict(run)) + "\n")


def _parse(line: str, where: str) -> Run:
    try:
        fields: dict[str, Any] = json.loads(line)
        schema = fields.pop("schema")
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}, expected {SCHEMA!r}")
        return Run(**fields | {"seconds": tuple(fields["seconds"])})
    except (ValueError, KeyError, TypeError) as error:
        raise VortexError(f"{where} is not a benchmark's run ({error}). Remove the line or the file.") from error
