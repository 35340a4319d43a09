"""Whether live scores still look like those a probe was calibrated on.

1. The calibration scores are cut into bins of about equal count (quantiles, equal edges merged); the outer bins are
   open. The histogram is small, frozen, and kept with the monitor.
2. Live scores are counted into the same bins, one addition each; with `half_life` older counts fade.
3. Population stability index: sum over bins of (q - p) ln(q / p), p and q the calibration's and the live shares, with
   half a count added to every bin of either. Customary reading: below 0.1 steady, above 0.25 moved.
4. Kolmogorov-Smirnov: the largest distance of the two distribution functions at the bins' edges, a lower bound of the
   exact statistic that loses at most one bin's share; its p-value is asymptotic, with the effective sizes of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import stats

from glasshouse.server.probes.examples import FloatRows
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

DEFAULT_BINS = 20


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """`edges`: inner edges, ascending, n_bins - 1 of them; bin i holds edges[i-1] <= score < edges[i]. `counts`: n_bins."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, scores: FloatRows, *, n_bins: int = DEFAULT_BINS) -> ScoreHistogram:
        """Of calibration scores (n,).

        Raises:
            InvalidArgument: fewer than two bins, fewer scores than bins, or scores that are not finite.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if n_bins < 2 or scores.ndim != 1 or len(scores) < n_bins:
            raise InvalidArgument(
                f"{scores.size} calibration scores do not fill {n_bins} bins",
                reason=reasons.TOO_FEW_EXAMPLES if n_bins >= 2 else reasons.VALUE_OUT_OF_RANGE,
                field="calibration_scores",
                value=scores.shape,
                remedy="calibrate on more examples, or use fewer bins, at least 2",
            )
        if not np.isfinite(scores).all():
            raise InvalidArgument(
                "a calibration score is not finite",
                reason=reasons.VALUE_NOT_FINITE,
                field="calibration_scores",
                value=scores[~np.isfinite(scores)][0],
                remedy="leave it out",
            )
        inner = np.unique(np.quantile(scores, np.arange(1, n_bins) / n_bins))
        # An edge at the smallest score would open a bin that nothing can be in.
        inner = inner[inner > scores.min()]
        counts = np.bincount(np.searchsorted(inner, scores, side="right"), minlength=len(inner) + 1)
        return cls(edges=tuple(inner.tolist()), counts=tuple(counts.tolist()))

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"edges": list(self.edges), "counts": list(self.counts)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> ScoreHistogram:
        """Of `to_json`. Raises `InvalidArgument` where it is none."""
        edges = tuple(float(edge) for edge in body.get("edges", ()))
        counts = tuple(int(count) for count in body.get("counts", ()))
        ascending = all(low < high for low, high in pairwise(edges))
        if len(counts) != len(edges) + 1 or not ascending or min(counts) < 0 or not sum(counts):
            raise InvalidArgument(
                f"{len(edges)} edges and {len(counts)} counts are not a histogram",
                reason=reasons.VALUE_MALFORMED,
                field="calibration_histogram",
                value=len(edges),
                remedy="edges ascend, and there is one count more than edges",
            )
        return cls(edges=edges, counts=counts)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far live scores have moved. `n_live` is the effective number of them (faded counts)."""

    population_stability_index: float
    ks_statistic: float
    ks_p_value: float
    n_live: float


class DriftWatch:
    """Streams live scores against a calibration histogram. Not safe to use from several threads at once.

    `half_life`: after that many further scores a score counts half; None: all count the same for ever.
    """

    def __init__(self, calibration: ScoreHistogram, *, half_life: float | None = None) -> None:
        if half_life is not None and not half_life > 0:
            raise InvalidArgument(
                f"half_life {half_life} is not above 0",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="half_life",
                value=half_life,
                remedy="give a number of scores, or none",
            )
        self.calibration = calibration
        self.n_not_finite = 0
        self._edges = np.array(calibration.edges)
        self._live = np.zeros(len(calibration.counts), dtype=np.float64)
        self._decay_rate = 0.0 if half_life is None else math.log(2.0) / half_life

    def add(self, scores: FloatRows) -> None:
        """Counts scores (n,), oldest first. Those not finite are counted apart, in `n_not_finite`."""
        scores = np.asarray(scores, dtype=np.float64).ravel()
        finite = np.isfinite(scores)
        self.n_not_finite += int((~finite).sum())
        scores = scores[finite]
        bins = np.searchsorted(self._edges, scores, side="right")
        ages = np.arange(len(scores) - 1, -1, -1)
        self._live *= math.exp(-self._decay_rate * len(scores))
        self._live += np.bincount(bins, weights=np.exp(-self._decay_rate * ages), minlength=len(self._live))

    def read(self) -> Drift:
        """The distance so far; of no score at all it is none."""
        before, live = np.array(self.calibration.counts, dtype=np.float64), self._live
        n_before, n_live = float(before.sum()), float(live.sum())
        if n_live == 0.0:
            return Drift(population_stability_index=0.0, ks_statistic=0.0, ks_p_value=1.0, n_live=0.0)
        p = (before + 0.5) / (n_before + 0.5 * len(before))
        q = (live + 0.5) / (n_live + 0.5 * len(live))
        distance = float(
            np.abs(np.cumsum(live) / n_live - np.cumsum(before) / n_before)[:-1].max(initial=0.0)
        )
        effective = math.sqrt(n_before * n_live / (n_before + n_live))
        return Drift(
            population_stability_index=float(((q - p) * np.log(q / p)).sum()),
            ks_statistic=distance,
            ks_p_value=float(stats.kstwobign.sf(distance * effective)),
            n_live=n_live,
        )
