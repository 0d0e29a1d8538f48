"""Reports in the formats of other programs: CSV, JSON lines, Prometheus' text format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.whole_files import add_line, write

if TYPE_CHECKING:
    from .samples import Sample

Metric = tuple[str, Mapping[str, str], float]  # name, labels, value


def write_csv(samples: Sequence[Sample], path: Path) -> None:
    """One picture a line, its phases as columns, seconds."""
    phases = list(dict.fromkeys(name for sample in samples for name in sample.phases))
    reading = ("clock", "memory_clock", "temperature", "power", "throttled", "load")
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("index", "cold", "prompt", "seed", "started", "seconds", *phases, "unmarked", *reading))
    for s in samples:
        spans = [s.phases.get(name) for name in phases]
        state = [getattr(s.reading, name) for name in reading]
        state[4] = "+".join(state[4] or ())
        lines.writerow((s.index, int(s.cold), s.prompt, s.seed, s.started, s.seconds, *spans, s.unmarked, *state))
    write(path, text.getvalue().encode(), replace=True)


def append_json(path: Path, event: str, fields: Mapping[str, Any]) -> None:
    """Add one JSON line to a log."""
    add_line(path, json.dumps({"event": event, **fields}).encode())


def latency_metrics(figures: Mapping[str, Any]) -> Iterator[Metric]:
    """Quantiles, sum and count of each kind of picture and of each of its phases."""
    work = figures["workload"]
    about = {"model": figures["model"]["name"], "size": f"{work['width']}x{work['height']}"}
    for kind, series in figures["series"].items():
        for phase, latency in {"whole": series["whole"], **series["phases"]}.items():
            labels = about | {"prompt": kind, "phase": phase}
            for p in latency["percentiles"]:
                yield "vortex_picture_seconds", labels | {"quantile": f"{p['q'] / 100:g}"}, p["seconds"]
            yield "vortex_picture_seconds_sum", labels, latency["mean"] * latency["count"]
            yield "vortex_picture_seconds_count", labels, latency["count"]


def vram_metrics(figures: Mapping[str, Any]) -> Iterator[Metric]:
    """Every counter at every stage."""
    for stage in figures["stages"]:
        for counter, value in stage["counters"].items():
            if value is not None:
                labels = {"model": figures["model"]["name"], "stage": stage["name"], "counter": counter}
                yield "vortex_vram_bytes", labels, value


def write_prometheus(metrics: Iterable[Metric], kind: str, about: str, path: Path) -> None:
    """For node_exporter's textfile collector. All metrics are one family of `kind` (summary or gauge)."""
    lines: list[str] = []
    for name, labels, value in metrics:
        if not lines:
            lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        quoted = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{quoted}}} {value:.9g}")
    text = "\n".join(lines) + "\n"
    write(path, text.encode(errors="backslashreplace"), replace=True)  # whole: the collector may read at any moment


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
