"""Figures against scikit-learn, SciPy and small cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from glasshouse.server.probes.calibration import (
    CalibrationMethod,
    expected_calibration_error,
    fit_calibration,
    fit_platt,
)
from glasshouse.server.probes.discrimination import auroc, cohens_d, discriminate, proportion
from glasshouse.server.probes.operating_points import operating_points, threshold_at
from glasshouse.server.types.errors import InvalidArgument


def delong_variance(positive: np.ndarray, negative: np.ndarray) -> float:
    """By the definition: every pair."""
    psi = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    return float(psi.mean(1).var(ddof=1) / len(positive) + psi.mean(0).var(ddof=1) / len(negative))


def test_auroc_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    scores = np.round(rng.normal(size=300) + labels, 1)  # rounded: with ties
    found = auroc(scores, labels)
    assert math.isclose(found.value, roc_auc_score(labels, scores), abs_tol=1e-12)
    reach = 1.959963984540054 * math.sqrt(delong_variance(scores[labels == 1], scores[labels == 0]))
    assert math.isclose(found.high - found.value, reach, rel_tol=1e-9)
    assert math.isclose(found.value - found.low, reach, rel_tol=1e-9)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(1), 0
    truth = stats.norm.cdf(1 / math.sqrt(2))
    labels = np.arange(120) % 2
    for _ in range(300):
        found = auroc(rng.normal(size=120) + labels, labels)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 300 <= 0.985


def test_perfect_order_is_not_certain() -> None:
    found = auroc(np.arange(10.0), np.arange(10) // 5)
    assert (found.value, found.high) == (1.0, 1.0)
    # Five of five: 0.025 ** (1 / 5).
    assert math.isclose(found.low, 0.478176, abs_tol=1e-6)


def test_by_hand() -> None:
    labels = np.array([0, 0, 1, 1])
    figures = discriminate(np.array([1.0, 3.0, 2.0, 4.0]), labels, threshold=2.5)
    assert (figures.auroc.value, figures.accuracy.value) == (0.75, 0.5)
    assert math.isclose(figures.effect_size, 1 / math.sqrt(2))
    assert cohens_d(np.ones(3), np.zeros(3)) == math.inf
    assert figures.metrics["auroc"] == 0.75
    assert "effect_size" not in discriminate(labels.astype(float), labels, threshold=0.5).metrics
    # R: binom.test(3, 20)$conf.int
    interval = proportion(3, 20)
    assert (round(interval.low, 6), round(interval.high, 6)) == (0.032071, 0.378927)
    assert proportion(0, 10).low == 0.0
    assert math.isnan(proportion(0, 0).value)
    assert math.isclose(expected_calibration_error(np.array([0.0, 0.05, 0.9, 1.0]), labels), (0.05 + 0.1) / 4)


def test_refusals() -> None:
    with pytest.raises(InvalidArgument, match="0 positive and 3 negative"):
        auroc(np.arange(3.0), np.zeros(3))
    with pytest.raises(InvalidArgument, match="not finite"):
        auroc(np.array([1.0, np.nan]), np.array([0, 1]))
    with pytest.raises(InvalidArgument, match=r"not in \[0, 1\)"):
        threshold_at(np.arange(3.0), 1.0)


def test_thresholds() -> None:
    negatives = np.arange(100.0)
    assert threshold_at(negatives, 0.05) == (94.0, True)
    assert threshold_at(negatives, 0.01) == (98.0, True)
    assert threshold_at(negatives, 0.001) == (99.0, False)
    labels = np.array([0] * 100 + [1] * 4)
    judged = np.concatenate([np.arange(100.0) + 2, [90.0, 95.0, 96.0, 97.0]])
    (point,) = operating_points([0.05], choosing=(negatives, np.zeros(100)), judging=(judged, labels))
    assert (point.false_positive_rate.value, point.true_positive_rate.value) == (0.07, 0.75)
    assert point.false_positive_rate.low < 0.07 < point.false_positive_rate.high


def test_platt_is_the_likeliest_sigmoid() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 500)
    margins = 40.0 * (rng.normal(size=500) + labels)
    slope, offset = fit_platt(margins, labels)
    n_positive = labels.sum()
    targets = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (500 - n_positive + 2))
    missed = 1 / (1 + np.exp(-(slope * margins + offset))) - targets
    assert abs(missed.sum()) < 1e-4
    assert abs(missed @ margins) < 1e-2


@pytest.mark.parametrize("method", [CalibrationMethod.PLATT, CalibrationMethod.ISOTONIC])
def test_calibration_repairs_overconfidence(method: CalibrationMethod) -> None:
    import torch
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(3)
    truth = rng.normal(size=4000) * 1.5
    labels = (rng.random(4000) < 1 / (1 + np.exp(-truth))).astype(np.int64)
    margins = 6.0 * truth[:, None]
    calibration = fit_calibration(margins[:2000], labels[:2000, None], method)
    assert calibration is not None
    before = 1 / (1 + np.exp(-margins[2000:, 0]))
    after = calibration(torch.from_numpy(margins[2000:]))[:, 0].numpy()
    assert expected_calibration_error(after, labels[2000:]) < 0.05
    assert expected_calibration_error(before, labels[2000:]) > 0.1
    if method is CalibrationMethod.ISOTONIC:
        peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
            margins[:2000, 0], labels[:2000]
        )
        np.testing.assert_allclose(after, peer.predict(margins[2000:, 0]), atol=1e-9)
