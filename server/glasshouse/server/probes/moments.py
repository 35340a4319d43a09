"""Counts, means and covariances of classes, streamed in float64.

Batches are joined by Chan, Golub & LeVeque's update (1979), which loses nothing to the size of the mean: the
activations of language models have a few coordinates hundreds of times larger than the rest.
"""

from __future__ import annotations

import numpy as np

from glasshouse.server.probes.examples import FloatRows, IntRows, check_rows


class Moments:
    """Count, mean (W,) and, with `spread`, the scatter sum (x - mean)(x - mean)^T (W, W), of all rows added."""

    def __init__(self, width: int, *, spread: bool = False) -> None:
        self.n = 0
        self.mean = np.zeros(width, dtype=np.float64)
        self.scatter = np.zeros((width, width), dtype=np.float64) if spread else None

    def add(self, rows: FloatRows, field: str = "activations") -> None:
        """Rows (n, W) of any float dtype. Raises `InvalidArgument` for another width or values not finite."""
        check_rows(rows, field, width=self.mean.shape[0])
        n_new = rows.shape[0]
        if n_new == 0:
            return
        x = np.asarray(rows, dtype=np.float64)
        centre = x.mean(axis=0)
        shift = centre - self.mean
        total = self.n + n_new
        if self.scatter is not None:
            around = x - centre
            self.scatter += around.T @ around + np.outer(shift, shift) * (self.n * n_new / total)
        self.mean += shift * (n_new / total)
        self.n = total

    @property
    def second_moment(self) -> FloatRows:
        """(W, W) E[x x^T] about zero. Needs `spread`."""
        assert self.scatter is not None, "second_moment needs spread=True"
        return self.scatter / max(self.n, 1) + np.outer(self.mean, self.mean)


class ClassMoments:
    """One `Moments` a class 0..K-1."""

    def __init__(self, width: int, *, n_classes: int = 2, spread: bool = False) -> None:
        self.of_class = [Moments(width, spread=spread) for _ in range(n_classes)]

    def add(self, rows: FloatRows, labels: IntRows) -> None:
        """Rows (n, W) with their classes, int64 (n,)."""
        check_rows(rows, "activations", n_rows=labels.shape[0])
        for number, moments in enumerate(self.of_class):
            moments.add(rows[labels == number])

    @property
    def means(self) -> FloatRows:
        """(K, W) float64."""
        return np.stack([moments.mean for moments in self.of_class])

    @property
    def centre(self) -> FloatRows:
        """(W,): the mean of the classes' means, whatever their sizes."""
        centre: FloatRows = self.means.mean(axis=0)
        return centre

    @property
    def within(self) -> FloatRows:
        """(W, W) pooled covariance around the classes' own means, divided by n - K. Needs `spread`."""
        total = np.zeros_like(self.of_class[0].second_moment)
        for moments in self.of_class:
            assert moments.scatter is not None
            total += moments.scatter
        return total / max(sum(moments.n for moments in self.of_class) - len(self.of_class), 1)
