"""Updates that add nothing. Programs that take the difference of two models write zeros for what did not change."""

from __future__ import annotations

from collections.abc import Mapping

from ..storage.files import Raw
from ..storage.tensors import FLOATS

MOST = 200 * 10**6  # bytes that are read to see it; CLIP's whole table has 152 MB in fp32


def is_nothing(raw: Raw, roles: Mapping[str, str]) -> bool:
    """Whether a module's update is zero: one of its two factors is, or all that it has."""
    keys = {role: key for role, key in roles.items() if role != "alpha"}
    if sum(map(raw.nbytes, keys.values())) > MOST or any(raw.dtype(key) not in FLOATS for key in keys.values()):
        return False
    if keys.keys() == {"up", "down"}:
        return _is_zero(raw, keys["up"]) or _is_zero(raw, keys["down"])
    return all(_is_zero(raw, key) for key in keys.values())


def _is_zero(raw: Raw, key: str) -> bool:
    return not bool(raw.read(key).float().any())
