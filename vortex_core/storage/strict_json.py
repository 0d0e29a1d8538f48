"""JSON that all programs read alike: no key twice, of which some readers take the first and others the last."""

from __future__ import annotations

import json
from typing import Any


def unambiguous(text: str | bytes) -> Any:
    """JSON in which no object has a key twice. Raises `ValueError`, or `RecursionError`."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key stands twice in one table")
    return table
