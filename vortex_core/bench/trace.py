"""A run as a Chrome trace, for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .samples import Sample

MICROSECONDS = 1e6


def chrome_trace(samples: Iterable[Sample]) -> dict[str, Any]:
    """Pictures in one row, their phases in the next, clock and temperature as counters."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}}
        for tid, name in ((1, "pictures"), (2, "phases"))
    ]
    for sample in samples:
        at = sample.started * MICROSECONDS
        about = {"prompt": sample.prompt, "seed": sample.seed, "cold": sample.cold}
        events.append(_span(f"picture {sample.index}", at, sample.seconds, 1, about))
        for name, seconds in sample.phases.items():
            events.append(_span(name, at, seconds, 2, {}))
            at += seconds * MICROSECONDS
        for name, value in (("SM clock, MHz", sample.reading.clock), ("temperature, °C", sample.reading.temperature)):
            if value is not None:
                events.append({"ph": "C", "name": name, "pid": 1, "ts": at, "args": {"value": value}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _span(name: str, at: float, seconds: float, tid: int, about: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 1, "tid": tid, "ts": at, "dur": seconds * MICROSECONDS, "args": about}
