"""Difference in means: mu+ - mu-, at one hook point (Marks & Tegmark 2023, arXiv 2310.06824; Arditi et al. 2024,
arXiv 2406.11717).

Streamed: counts and means in float64, nothing else is kept.
"""

from __future__ import annotations

from glasshouse.server.probes.examples import FloatRows, IntRows
from glasshouse.server.probes.moments import ClassMoments


class DifferenceInMeans:
    """Streams labelled rows of `width`; `direction` is (width,) float64, not normalised."""

    def __init__(self, width: int) -> None:
        self._moments = ClassMoments(width)

    def add(self, rows: FloatRows, labels: IntRows) -> None:
        """Rows (n, width) with labels int64 (n,), 0 negative and 1 positive."""
        self._moments.add(rows, labels)

    @property
    def direction(self) -> FloatRows:
        """mu+ - mu-."""
        negative, positive = self._moments.means
        difference: FloatRows = positive - negative
        return difference

    @property
    def threshold(self) -> float:
        """The projection halfway between the classes' means: above it is positive."""
        return float(self._moments.centre @ self.direction)
