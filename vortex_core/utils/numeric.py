"""Numbers that callers give: Python's, numpy's or torch's. Bools and texts do not count as numbers."""

from __future__ import annotations

import math
from numbers import Real
from operator import index
from typing import Any


def whole(value: object) -> int | None:
    """`value` as an int, if it is a whole number of an integer type; else None."""
    if _is_bool(value):
        return None
    try:
        return index(value)  # type: ignore[arg-type]
    except Exception:  # a class of the caller's may raise anything
        return None


def finite(value: object) -> float | None:
    """`value` as a float, if it is a real number and neither infinite nor NaN; else None."""
    if _is_bool(value):
        return None
    try:
        plain: Any = value.item() if hasattr(value, "item") else value  # numpy's and torch's, of one element
        number = float(plain) if isinstance(plain, Real) else math.nan
    except Exception:  # too large for a float, or many elements
        return None
    return number if math.isfinite(number) else None


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
