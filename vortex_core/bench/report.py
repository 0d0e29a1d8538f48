"""What every report has: model, machine and time, a title, verdicts, all figures as JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from .machine import Machine
from .verdict import Verdict


@dataclass(frozen=True, slots=True)
class Report(ABC):
    """All that a run measured. `model` describes the engine; `when` it started, ISO 8601."""

    schema: ClassVar[str]
    model: dict[str, str]
    machine: Machine
    when: str

    @property
    def title(self) -> str:
        """What was measured, where."""
        return f"{self.model['name']}, {self.words}, on {self.machine.device}"

    @property
    @abstractmethod
    def words(self) -> str:
        """What was drawn, in words."""

    @property
    @abstractmethod
    def verdicts(self) -> list[Verdict]:
        """The judgements of this report."""

    @abstractmethod
    def measured(self) -> dict[str, Any]:
        """The report's own part of `figures`."""

    def figures(self) -> dict[str, Any]:
        """Everything but single samples, for JSON."""
        return {
            "schema": self.schema,
            "when": self.when,
            "model": self.model,
            "machine": self.machine.as_dict(),
            **self.measured(),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }
