"""Margins into probabilities, and how far probabilities can be trusted.

A margin is one column's log-odds as the probe states them. Each column is calibrated by itself:

- Platt (1999): p = sigma(a * margin + b), fitted by maximum likelihood to targets (n+ + 1)/(n+ + 2) and 1/(n- + 2).
- Isotonic (Zadrozny & Elkan 2002): the best non-decreasing map, linear between its knots, flat beyond them.

Fit them on margins of examples the probe was not fitted on (`training` uses out-of-fold margins). Expected
calibration error (Guo et al. 2017, arXiv 1706.04599): sum over equal-width bins of n_b / N * |share of positives - mean
probability|.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from scipy import optimize, special
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from glasshouse.server.probes.examples import FloatRows, IntRows

ECE_BINS = 15


class CalibrationMethod(Enum):
    """How margins become probabilities; NONE is sigma(margin)."""

    NONE = "none"
    PLATT = "platt"
    ISOTONIC = "isotonic"


@dataclass(frozen=True, eq=False)
class PlattScaling:
    """p = sigma(slopes * margin + offsets); both (C,)."""

    slopes: Tensor
    offsets: Tensor

    def __call__(self, margins_NC: Tensor) -> Tensor:
        """Probabilities (N, C)."""
        return torch.sigmoid(margins_NC * self.slopes + self.offsets)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PlattScaling:
        """The same on another device in another dtype."""
        return PlattScaling(self.slopes.to(device, dtype), self.offsets.to(device, dtype))


@dataclass(frozen=True, eq=False)
class IsotonicScaling:
    """Per column the knots: margins, ascending, and their probabilities, both (n_knots,)."""

    margins: tuple[Tensor, ...]
    probabilities: tuple[Tensor, ...]

    def __call__(self, margins_NC: Tensor) -> Tensor:
        """Probabilities (N, C)."""
        columns = [
            _interpolate(margins_NC[:, c].contiguous(), at, to)
            for c, (at, to) in enumerate(zip(self.margins, self.probabilities, strict=True))
        ]
        return torch.stack(columns, dim=1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> IsotonicScaling:
        """The same on another device in another dtype."""
        return IsotonicScaling(
            tuple(knots.to(device, dtype) for knots in self.margins),
            tuple(knots.to(device, dtype) for knots in self.probabilities),
        )


Calibration = PlattScaling | IsotonicScaling


def _interpolate(x_N: Tensor, at: Tensor, to: Tensor) -> Tensor:
    if len(at) == 1:
        return torch.where(x_N.isnan(), x_N, to[0])
    x_N = x_N.clamp(at[0], at[-1])
    right = torch.searchsorted(at, x_N).clamp(1, len(at) - 1)
    left = right - 1
    share = (x_N - at[left]) / (at[right] - at[left])
    return to[left] + share * (to[right] - to[left])


def fit_calibration(margins: FloatRows, columns: IntRows, method: CalibrationMethod) -> Calibration | None:
    """Fits margins (N, C) to columns (N, C) of 0 and 1, both values present in each. None for NONE."""
    if method is CalibrationMethod.NONE:
        return None
    pairs = [(margins[:, c], columns[:, c]) for c in range(margins.shape[1])]
    if method is CalibrationMethod.PLATT:
        fitted = np.array([fit_platt(margin, label) for margin, label in pairs])
        return PlattScaling(torch.from_numpy(fitted[:, 0].copy()), torch.from_numpy(fitted[:, 1].copy()))
    knots = [_fit_isotonic(margin, label) for margin, label in pairs]
    return IsotonicScaling(tuple(at for at, _ in knots), tuple(to for _, to in knots))


def fit_platt(margins: FloatRows, labels: IntRows) -> tuple[float, float]:
    """(slope, offset) of margins (N,) for labels (N,) of 0 and 1."""
    n_positive = int(labels.sum())
    n_negative = len(labels) - n_positive
    targets = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    # Margins of unit spread, so that the optimiser meets the same problem whatever their scale.
    scale = float(np.std(margins)) or 1.0
    x = margins / scale

    def loss(ab: FloatRows) -> tuple[float, FloatRows]:
        z = ab[0] * x + ab[1]
        missed = special.expit(z) - targets
        value = float((np.logaddexp(0.0, z) - targets * z).sum())
        return value, np.array([missed @ x, missed.sum()])

    start = np.array([0.0, np.log((n_positive + 1) / (n_negative + 1))])
    found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-8})
    return float(found.x[0]) / scale, float(found.x[1])


def _fit_isotonic(margins: FloatRows, labels: IntRows) -> tuple[Tensor, Tensor]:
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(margins, labels)
    return (
        torch.from_numpy(np.asarray(model.X_thresholds_, dtype=np.float64)),
        torch.from_numpy(np.asarray(model.y_thresholds_, dtype=np.float64)),
    )


def expected_calibration_error(probabilities: FloatRows, labels: IntRows, *, n_bins: int = ECE_BINS) -> float:
    """ECE of probabilities (N,) of the positive class for labels (N,) of 0 and 1; bins of width 1 / `n_bins`, closed
    above, 0 in the first.
    """
    bins = np.clip(np.ceil(probabilities * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=labels - probabilities, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(labels))


def brier_score(probabilities: FloatRows, labels: IntRows) -> float:
    """Mean squared distance of probabilities (N,) from labels (N,) of 0 and 1."""
    return float(((probabilities - labels) ** 2).mean())
