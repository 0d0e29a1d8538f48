"""Numbers that somebody gives us: Python's, numpy's or torch's. A bool is none, nor is a text that looks like one."""

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
    except Exception:  # of somebody's own class, too
        return None


def finite(value: object) -> float | None:
    """`value` as a float, if it is a real number and neither infinite nor NaN; else None."""
    if _is_bool(value):
        return None
    try:
        plain: Any = value.item() if hasattr(value, "item") else value  # of numpy and torch, one element
        number = float(plain) if isinstance(plain, Real) else math.nan
    except Exception:  # more than a float can be; many elements
        return None
    return number if math.isfinite(number) else None


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
