"""Thresholds at chosen false-positive rates, and what they do on examples that did not choose them.

1. The threshold for a rate is taken from the negatives' scores of one set: the smallest value that at most
   floor(rate * n) of them lie above.
2. False- and true-positive rates at it are counted on another, held-out set, with Clopper-Pearson intervals.

A rate below 1 / n of the negatives that choose cannot be resolved: the threshold is then their highest score and
`resolved` is False.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.server.probes.discrimination import Interval, proportion
from glasshouse.server.probes.examples import BoolRows, FloatRows, IntRows
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A score above `threshold` is positive. Rates are of the held-out examples."""

    wanted_false_positive_rate: float
    threshold: float
    resolved: bool
    false_positive_rate: Interval
    true_positive_rate: Interval


def threshold_at(negatives: FloatRows, rate: float) -> tuple[float, bool]:
    """The threshold that at most `rate` of the negatives' scores (n,) lie above, and whether n can resolve the rate.

    Raises:
        InvalidArgument: a rate that is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise InvalidArgument(
            f"false-positive rate {rate} is not in [0, 1)",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="false_positive_rates",
            value=rate,
            remedy="give rates such as 0.01",
        )
    descending = np.sort(negatives)[::-1]
    allowed = math.floor(rate * len(descending) + 1e-9)
    return float(descending[allowed]), rate * len(descending) >= 1.0 - 1e-9


def operating_points(
    rates: Sequence[float],
    *,
    choosing: tuple[FloatRows, IntRows],
    judging: tuple[FloatRows, IntRows],
    level: float = 0.95,
) -> tuple[OperatingPoint, ...]:
    """One point a rate. `choosing` and `judging`: scores (n,) and labels (n,) of 0 and 1, of different examples."""
    negatives = choosing[0][choosing[1] == 0]
    scores, labels = judging
    points = []
    for rate in rates:
        threshold, resolved = threshold_at(negatives, rate)
        above = scores > threshold
        points.append(
            OperatingPoint(
                wanted_false_positive_rate=rate,
                threshold=threshold,
                resolved=resolved,
                false_positive_rate=_rate(above, labels == 0, level),
                true_positive_rate=_rate(above, labels == 1, level),
            )
        )
    return tuple(points)


def _rate(above: BoolRows, of: BoolRows, level: float) -> Interval:
    return proportion(int((above & of).sum()), int(of.sum()), level=level)
