"""Judgements and times in words, and the exit code that a CI job reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
EXIT_FAIL, EXIT_UNDECIDED = 1, 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """`what` was judged, `state` is `pass`, `fail` or `undecided` (the samples cannot tell), `detail` says why."""

    what: str
    state: str
    detail: str


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """1 where something failed, else 3 where something is undecided, else 0."""
    states = {verdict.state for verdict in verdicts}
    if FAIL in states:
        return EXIT_FAIL
    return EXIT_UNDECIDED if UNDECIDED in states else 0


def milliseconds(seconds: float) -> str:
    """Seconds as text in milliseconds."""
    return f"{seconds * 1e3:.1f} ms"
