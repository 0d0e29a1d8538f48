"""The noise levels that a picture goes through, from 1 (all noise) to 0."""

from __future__ import annotations

import math


def timesteps(steps: int, strength: float = 1.0) -> tuple[float, ...]:
    """schnell's schedule: even, from `strength` to 0 (shift 1), with the spacing of `steps` from 1 or a little less.

    A picture that begins with another one at strength .5 so takes half the steps.
    """
    number = max(1, math.ceil(steps * strength - 1e-9))
    return tuple(strength * (1 - i / number) for i in range(number + 1))
