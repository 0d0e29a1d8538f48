"""Bounds of values that files and callers give. A dataclass has them field by field."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ..errors import VortexCheckpointError, quoted


class Bounds(Protocol):
    """A set of values; its `str` ends the sentence "it should be ..."."""

    def __contains__(self, value: object) -> bool: ...


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole numbers from `least` to `most` that `by` divides. `True` does not count as a number."""

    least: int
    most: int
    by: int = 1

    def __contains__(self, value: object) -> bool:
        return type(value) is int and self.least <= value <= self.most and value % self.by == 0

    def __str__(self) -> str:
        multiple = f", a multiple of {self.by}" if self.by > 1 else ""
        return f"a whole number from {self.least} to {self.most}{multiple}"


@dataclass(frozen=True, slots=True)
class Real:
    """Finite numbers from `least` to `most`."""

    least: float
    most: float

    def __contains__(self, value: object) -> bool:
        return type(value) in (int, float) and self.least <= value <= self.most  # type: ignore[operator]

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True, slots=True)
class Several:
    """Tuples of `count` values, each in `each`."""

    each: Whole
    count: int

    def __contains__(self, value: object) -> bool:
        return type(value) is tuple and len(value) == self.count and all(item in self.each for item in value)

    def __str__(self) -> str:
        return f"{self.count} numbers, each {self.each}"


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of `values`, of the same type."""

    values: tuple[str | bool | int | None, ...]

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return " or ".join(repr(value) for value in self.values)


def within(default: object, bounds: Bounds) -> Any:
    """A dataclass field with `bounds`."""
    return field(default=default, metadata={"bounds": bounds})


def bounds_of(spec: type[Any]) -> dict[str, Bounds]:
    """The bounds of a dataclass' fields."""
    return {part.name: part.metadata["bounds"] for part in fields(spec)}


def check_fields(spec: Any, owner: str) -> None:
    """Raise `VortexCheckpointError` unless every field of a dataclass is within its bounds; `owner` names it."""
    for name, bounds in bounds_of(type(spec)).items():
        value = getattr(spec, name)
        if value not in bounds:
            raise VortexCheckpointError(f"{owner}'s {name} should be {bounds}, not {quoted(value)}.")
