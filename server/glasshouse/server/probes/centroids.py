"""k-means: clusters of activations as directions.

The clustering is scikit-learn's (Lloyd's algorithm, k-means++ seeding, the best of `n_starts`), which sees no labels.
A cluster's direction is its centroid minus the grand mean. With labels the pair of clusters that separates them best
gives one direction: the centroid with the largest share of positive rows minus the one with the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans

from glasshouse.server.probes.examples import FloatRows, IntRows, check_rows
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class Centroids:
    """`centroids` float64 (k, W), by size, largest first; `grand_mean` (W,); `members` int64 (N,), each row's cluster."""

    centroids: FloatRows
    grand_mean: FloatRows
    members: IntRows

    @property
    def directions(self) -> FloatRows:
        """(k, W): centroid minus grand mean."""
        return self.centroids - self.grand_mean

    def contrast(self, labels: IntRows) -> tuple[FloatRows, float]:
        """The direction (W,) between the most positive and the most negative cluster, and its midpoint's projection.

        `labels`: int64 (N,) of 0 and 1, of the rows that were clustered.
        """
        shares = [float(labels[self.members == c].mean()) for c in range(len(self.centroids))]
        high, low = int(np.argmax(shares)), int(np.argmin(shares))
        if high == low:
            high, low = 1, 0
        direction: FloatRows = self.centroids[high] - self.centroids[low]
        return direction, float(direction @ (self.centroids[high] + self.centroids[low]) / 2)


def fit_centroids(rows: FloatRows, *, n_clusters: int = 2, seed: int = 0, n_starts: int = 10) -> Centroids:
    """Clusters rows (N, W) into `n_clusters`.

    Raises:
        InvalidArgument: fewer than two clusters, or fewer different rows than clusters.
    """
    check_rows(rows, "activations")
    if n_clusters < 2:
        raise InvalidArgument(
            f"n_clusters {n_clusters} is below 2",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="n_clusters",
            value=n_clusters,
            remedy="ask for at least 2 clusters",
        )
    x = np.asarray(rows, dtype=np.float64)
    n_different = len(np.unique(x, axis=0))
    if n_different < n_clusters:
        raise InvalidArgument(
            f"{n_different} different examples do not make {n_clusters} clusters",
            reason=reasons.TOO_FEW_EXAMPLES,
            field="n_clusters",
            value=n_clusters,
            remedy="add examples or ask for fewer clusters",
        )
    model = KMeans(n_clusters=n_clusters, n_init=n_starts, random_state=seed).fit(x)
    order = np.argsort(-np.bincount(model.labels_, minlength=n_clusters), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(n_clusters)
    return Centroids(
        centroids=model.cluster_centers_[order],
        grand_mean=x.mean(axis=0),
        members=place[model.labels_].astype(np.int64),
    )
