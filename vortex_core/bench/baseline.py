"""Keeps runs, so that later runs can be compared with them.

Runs can be compared if machine, model, size, steps and prompts are equal. Each such set of facts has one JSON-lines
file, with one run a line, the oldest first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeGuard

from ..errors import VortexError
from ..utils.paths import user_folder
from ..utils.printable import printable
from ..utils.whole_files import add_line
from .latency_report import LatencyReport
from .machine import Machine
from .workload import Workload

SCHEMA = "vortex.bench.run/1"
MAX_BYTES = 100_000_000  # a run of 10,000 pictures takes 0.2 MB
YEAR = 3.2e7  # seconds


@dataclass(frozen=True, slots=True)
class Run:
    """One run: `seconds` of its pictures with cached prompts. `baseline`: later runs are compared with it."""

    when: str
    vortex: str
    baseline: bool
    seconds: tuple[float, ...]
    phases: dict[str, float]  # medians


class History:
    """The runs in `folder` of one machine, model and workload: they can be compared with each other.

    `folder` is by default `$VORTEX_BASELINES` or the user's data folder.
    """

    def __init__(self, folder: Path | None, machine: Machine, model: dict[str, str], workload: Workload) -> None:
        work = asdict(workload)
        facts = {"model": model} | {key: work[key] for key in ("width", "height", "steps", "prompts")}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self.path = (folder or default_folder()) / f"{machine.fingerprint}-{digest}.jsonl"

    def runs(self) -> list[Run]:
        """The oldest first. Raises `VortexError` for a file that is damaged, or too large to be a history."""
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise VortexError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(content) > MAX_BYTES:
            raise VortexError(f"{self.path} is over {MAX_BYTES / 1e6:.0f} MB, too large for runs. Remove the file.")
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
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
        add_line(self.path, json.dumps({"schema": SCHEMA} | asdict(run)).encode())


def default_folder() -> Path:
    """`$VORTEX_BASELINES`, else in the user's data folder. Raises `VortexInputError` where nobody knows one."""
    advice = " to keep runs in; name one with --folder."
    return user_folder("VORTEX_BASELINES", ("XDG_DATA_HOME",), ".local/share", "vortex/baselines", advice)


def _parse(line: bytes, where: str) -> Run:
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise ValueError(f"it does not say {SCHEMA!r}")
        seconds, phases = fields["seconds"], fields["phases"]
        when, vortex = fields["when"], fields["vortex"]
        if not all(isinstance(word, str) and len(word) <= 64 and word.isprintable() for word in (when, vortex)):
            raise ValueError("its date or version is not text")
        if not isinstance(fields["baseline"], bool):
            raise ValueError("it does not say whether it is a baseline")
        if not isinstance(seconds, list) or not seconds or not all(_is_time(value) and value > 0 for value in seconds):
            raise ValueError("its seconds are no list of times above 0")
        if not isinstance(phases, dict) or not all(_is_time(value) for value in phases.values()):
            raise ValueError("its phases are no numbers of seconds")
        return Run(when, vortex, fields["baseline"], tuple(map(float, seconds)), phases)
    except KeyError as error:
        why = f"it lacks {error}"
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        why = str(error)
    raise VortexError(f"{where} is not a benchmark's run ({printable(why)[:200]}). Remove the line or the file.")


def _is_time(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < YEAR
