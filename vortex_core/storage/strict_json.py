"""JSON as other programs read it, too: no key twice, of which one reader takes the first and another the last."""

from __future__ import annotations

import json
from typing import Any


def unambiguous(text: str | bytes) -> Any:
    """JSON in which no object has a key twice. Raises `ValueError`, or `RecursionError`."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found
