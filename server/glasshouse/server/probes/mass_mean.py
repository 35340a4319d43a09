"""The mass-mean probe (Marks & Tegmark 2023, arXiv 2310.06824, section 5).

theta = mu+ - mu-; p(positive | x) = sigma((x - c) . theta), or with the covariance correction
sigma((x - c) . Sigma^+ theta), where c is the midpoint of the classes' means and Sigma the pooled covariance around
them (the corrected form is linear discriminant analysis, exact for Gaussians of one covariance). The source centres
the inputs and leaves c out; subtracting c here is the same and keeps serving one affine map.

Streamed in float64. Sigma^+ is a pseudo-inverse: eigenvalues below `RANK_TOLERANCE` of the largest count as zero, so
that fewer examples than dimensions work.
"""

from __future__ import annotations

import numpy as np

from glasshouse.server.probes.examples import FloatRows, IntRows
from glasshouse.server.probes.moments import ClassMoments

RANK_TOLERANCE = 1e-10


class MassMean:
    """Streams labelled rows of `width`. With more than two classes, one direction a class (its mean minus the centre).

    `corrected`: the covariance form; keeps a (width, width) scatter a class.
    """

    def __init__(self, width: int, *, n_classes: int = 2, corrected: bool = False) -> None:
        self.corrected = corrected
        self._moments = ClassMoments(width, n_classes=n_classes, spread=corrected)

    def add(self, rows: FloatRows, labels: IntRows) -> None:
        """Rows (n, width) with labels int64 (n,), 0 negative and 1 positive, or 0..K-1."""
        self._moments.add(rows, labels)

    @property
    def direction(self) -> FloatRows:
        """(width,) theta or Sigma^+ theta of a binary task."""
        negative, positive = self._moments.means
        return self._correct((positive - negative)[:, None])[:, 0]

    @property
    def threshold(self) -> float:
        """The projection of the midpoint c on `direction`."""
        return float(self._moments.centre @ self.direction)

    def affine(self) -> tuple[FloatRows, FloatRows]:
        """Weights (width, C) and biases (C,) of the probe's logits: C = 1 in a binary task, else one a class.

        Of several classes, the logit of class k is the Gaussian discriminant mu_k . theta_k - |.|^2 / 2, with theta_k =
        mu_k (or Sigma^+ mu_k), all taken about the centre.
        """
        means, centre = self._moments.means, self._moments.centre
        if means.shape[0] == 2:
            weights = self.direction[:, None]
            return weights, -(centre @ weights)
        around = means - centre
        weights = self._correct(around.T)
        return weights, -(centre @ weights) - 0.5 * np.einsum("kw,wk->k", around, weights)

    def _correct(self, theta_WC: FloatRows) -> FloatRows:
        if not self.corrected:
            return theta_WC
        inverse = np.linalg.pinv(self._moments.within, rcond=RANK_TOLERANCE, hermitian=True)
        corrected: FloatRows = inverse @ theta_WC
        return corrected
