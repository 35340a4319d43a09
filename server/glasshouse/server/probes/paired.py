"""Directions from pairs h+, h- that differ in the concept alone. Streamed in float64.

- CAA (Rimsky et al. 2023, arXiv 2312.06681): mean(h+ - h-), read at the answer token.
- PCA of paired differences (Zou et al. 2023, arXiv 2310.01405; repeng): the first principal direction of h+ - h-.
  Centring decides what is found. Not centred (`centred=False`, the default) it is the direction that most of the
  differences' length lies along, the mean difference included. Centred (`centred=True`, what scikit-learn's PCA does)
  the mean difference is removed first: what is left is the direction in which pairs differ from one another, unless
  the caller swapped the sides of about half of the pairs beforehand.

The sign of a principal direction is arbitrary: here it is the one on which h+ - h- is positive on average.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from glasshouse.server.probes.examples import FloatRows, check_rows
from glasshouse.server.probes.moments import Moments


class _Pairs(ABC):
    def __init__(self, width: int, *, spread: bool) -> None:
        self._differences = Moments(width, spread=spread)
        self._middles = Moments(width)

    def add(self, positive: FloatRows, negative: FloatRows) -> None:
        """Both (m, width), row i against row i."""
        check_rows(positive, "positive", n_rows=negative.shape[0])
        above, below = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
        self._differences.add(above - below, "positive")
        self._middles.add((above + below) / 2, "positive")

    @property
    @abstractmethod
    def direction(self) -> FloatRows:
        """(width,) float64."""

    @property
    def threshold(self) -> float:
        """The projection of the mean midpoint of the pairs: above it is positive."""
        return float(self._middles.mean @ self.direction)


class ContrastiveActivations(_Pairs):
    """CAA; `direction` (width,) float64, not normalised."""

    def __init__(self, width: int) -> None:
        super().__init__(width, spread=False)

    @property
    def direction(self) -> FloatRows:
        """mean(h+ - h-)."""
        return self._differences.mean.copy()


class PairedDifferencePCA(_Pairs):
    """PCA-1 of h+ - h-; `direction` (width,) float64, of unit length. Keeps a (width, width) second moment."""

    def __init__(self, width: int, *, centred: bool = False) -> None:
        super().__init__(width, spread=True)
        self.centred = centred

    @property
    def direction(self) -> FloatRows:
        """The leading eigenvector, positive along the mean difference."""
        found = self._differences
        assert found.scatter is not None
        _, vectors = np.linalg.eigh(found.scatter if self.centred else found.second_moment)
        leading: FloatRows = vectors[:, -1]
        return -leading if leading @ found.mean < 0 else leading
