"""Judges whether pictures became slower, by rank tests on two sets of samples or on pairs.

Times have long tails and no normal distribution. So ranks are tested (Mann-Whitney, Wilcoxon), and the size of the
change is Hodges and Lehmann's: the median of all differences. Differences are of logarithms, so the change is a ratio.
A regression must be both: unlikely by chance, and large enough to matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import VortexInputError
from .verdict import FAIL, PASS, UNDECIDED, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALPHA = 0.005  # chance that noise is called a slow-down; the threshold makes it smaller still
THRESHOLD = 0.02  # the smallest slow-down that is called one
FEWEST = 10  # samples; with fewer pairs no p-value is clearly below ALPHA
Z_TWO_SIDED, Z_POWER, Z_ALPHA = 1.96, 1.645, 2.576  # of 95 %, of 95 %, of ALPHA


@dataclass(frozen=True, slots=True)
class Comparison:
    """`change` of the time a picture takes, 0.05 for 5 % slower, with its 95 % interval.

    `p_value`: how often noise alone would look as slow. `slower`: how often a later picture takes longer than an
    earlier one (its pair, where paired), 0.5 where nothing changed.
    """

    before: int
    after: int
    paired: bool
    change: float
    low: float
    high: float
    p_value: float
    slower: float

    def verdict(self, threshold: float = THRESHOLD) -> Verdict:
        """Fails for a slow-down of at least `threshold` that is unlikely by chance. Improvements pass."""
        what = f"no slow-down of {threshold:.1%} or more"
        change = f"{self.change:+.1%}, 95 % interval {self.low:+.1%} to {self.high:+.1%}, p {self.p_value:.2g}"
        if min(self.before, self.after) < FEWEST:
            return Verdict(what, UNDECIDED, f"not enough samples: {self.before} and {self.after} of {FEWEST}; {change}")
        if self.p_value < ALPHA and self.change >= threshold:
            return Verdict(what, FAIL, change)
        return Verdict(what, PASS, f"{change}; would have found {self.detectable(threshold):.1%} or more")

    def detectable(self, threshold: float = THRESHOLD) -> float:
        """The slow-down for which runs as noisy as these would fail about nine times of ten."""
        error = math.log((1 + self.high) / (1 + self.low)) / (2 * Z_TWO_SIDED)
        return math.expm1(max((Z_ALPHA + Z_POWER) * error, math.log1p(threshold) + Z_POWER * error))


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Two independent sets of seconds. Raises `VortexInputError` where one is empty or holds a time not above 0."""
    import numpy as np
    from scipy.stats import mannwhitneyu

    x, y = _logarithms(before), _logarithms(after)
    pairs = len(x) * len(y)
    test = mannwhitneyu(y, x, alternative="greater")
    change, low, high = _shift(np.subtract.outer(y, x), math.sqrt(pairs * (len(x) + len(y) + 1) / 12))
    return Comparison(len(x), len(y), False, change, low, high, float(test.pvalue), float(test.statistic) / pairs)


def compare_pairs(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Seconds in pairs: `before[i]` and `after[i]` are of the same picture, drawn in turn. Raises as `compare`."""
    import numpy as np
    from scipy.stats import wilcoxon

    difference = _logarithms(after) - _logarithms(before)
    count = len(difference)
    p_value = float(wilcoxon(difference, alternative="greater").pvalue) if difference.any() else 1.0
    walsh = np.add.outer(difference, difference)[np.triu_indices(count)] / 2
    change, low, high = _shift(walsh, math.sqrt(count * (count + 1) * (2 * count + 1) / 24))
    slower = float(np.mean((np.sign(difference) + 1) / 2))
    return Comparison(count, count, True, change, low, high, p_value, slower)


def _logarithms(seconds: Sequence[float]) -> NDArray[np.float64]:
    import numpy as np

    values = np.asarray(seconds, dtype=float)
    if not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise VortexInputError("A comparison needs at least one time on each side, and every time above 0.")
    return np.log(values)


def _shift(differences: NDArray[np.float64], deviation: float) -> tuple[float, float, float]:
    """Median and 95 % interval of a shift, as ratios less 1. `deviation` is the rank statistic's."""
    import numpy as np

    ordered = np.sort(differences, axis=None)
    reach = Z_TWO_SIDED * deviation
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach) - 1)
    middle, low, high = np.expm1((np.median(ordered), ordered[low], ordered[high]))
    return float(middle), float(low), float(high)
