"""How well scores tell two classes apart: AUROC with its interval, accuracy, effect size.

- AUROC is the share of (positive, negative) pairs in the right order, ties half (Mann-Whitney).
- Its variance is DeLong's (1988), by midranks in O(N log N) (Sun & Xu 2014, doi 10.1109/LSP.2014.2337313); the interval
  is normal, cut at [0, 1]. Where every pair is in order (or every one out of order) that variance is zero and says
  nothing: the open end is then the exact binomial bound for min(n+, n-) independent pairs, alpha/2 ** (1 / n).
- Effect size is Cohen's d: difference of means over the pooled standard deviation (n - 2).
- Binomial intervals are Clopper & Pearson's (1934), exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from glasshouse.server.probes.examples import FloatRows, IntRows
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with the interval that covers the truth at `level`."""

    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Discrimination:
    """Of scores against 0/1 labels. `accuracy` is at the threshold the scores came with, above it positive."""

    auroc: Interval
    accuracy: Interval
    effect_size: float
    n_positive: int
    n_negative: int

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures by name, those that are finite, for provenance."""
        found = {
            "auroc": self.auroc.value,
            "auroc_low": self.auroc.low,
            "auroc_high": self.auroc.high,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "effect_size": self.effect_size,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


def discriminate(
    scores: FloatRows, labels: IntRows, *, threshold: float, level: float = 0.95
) -> Discrimination:
    """Measures scores (N,) of labels (N,) of 0 and 1, both present."""
    positive, negative = _classes(scores, labels)
    right = int(((scores > threshold) == (labels == 1)).sum())
    return Discrimination(
        auroc=auroc(scores, labels, level=level),
        accuracy=proportion(right, len(scores), level=level),
        effect_size=cohens_d(positive, negative),
        n_positive=len(positive),
        n_negative=len(negative),
    )


def auroc(scores: FloatRows, labels: IntRows, *, level: float = 0.95) -> Interval:
    """Area under the receiver operating characteristic of scores (N,), labels (N,) of 0 and 1, with its interval.

    Raises:
        InvalidArgument: one class only, or scores that are not finite.
    """
    positive, negative = _classes(scores, labels)
    m, n = len(positive), len(negative)
    among_all = stats.rankdata(np.concatenate([positive, negative]))
    # Share of the other class below each score, ties half: DeLong's structural components.
    above_m = (among_all[:m] - stats.rankdata(positive)) / n
    below_n = 1.0 - (among_all[m:] - stats.rankdata(negative)) / m
    area = float(above_m.mean())
    variance = _variance(above_m) / m + _variance(below_n) / n
    alpha = 1.0 - level
    reach = float(stats.norm.ppf(1.0 - alpha / 2)) * math.sqrt(variance)
    if variance == 0.0:
        reach = 1.0 - (alpha / 2) ** (1.0 / min(m, n))
    return Interval(value=area, low=max(area - reach, 0.0), high=min(area + reach, 1.0), level=level)


def _variance(values: FloatRows) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _classes(scores: FloatRows, labels: IntRows) -> tuple[FloatRows, FloatRows]:
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise InvalidArgument(
            "a score is not finite",
            reason=reasons.VALUE_NOT_FINITE,
            field="scores",
            value=scores[~np.isfinite(scores)][0],
            remedy="leave out the examples whose activations are not finite",
        )
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        raise InvalidArgument(
            f"{len(positive)} positive and {len(negative)} negative examples to judge by",
            reason=reasons.ONE_CLASS_ONLY,
            field="labels",
            value=len(scores),
            remedy="hold out examples of both classes",
        )
    return positive, negative


def cohens_d(positive: FloatRows, negative: FloatRows) -> float:
    """Difference of means over the pooled standard deviation; infinite where nothing varies within the classes."""
    m, n = len(positive), len(negative)
    within = float(((positive - positive.mean()) ** 2).sum() + ((negative - negative.mean()) ** 2).sum())
    difference = float(positive.mean() - negative.mean())
    if within == 0.0 or m + n <= 2:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(within / (m + n - 2))


def proportion(n_hits: int, n: int, *, level: float = 0.95) -> Interval:
    """n_hits / n with Clopper & Pearson's exact interval; of no trials the value is NaN within [0, 1]."""
    alpha = 1.0 - level
    low = float(stats.beta.ppf(alpha / 2, n_hits, n - n_hits + 1)) if n_hits else 0.0
    high = float(stats.beta.ppf(1.0 - alpha / 2, n_hits + 1, n - n_hits)) if n_hits < n else 1.0
    return Interval(value=n_hits / n if n else math.nan, low=low, high=high, level=level)
