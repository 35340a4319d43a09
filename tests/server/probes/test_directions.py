"""Each method on a planted direction, against its definition, and on labels that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from tests.server.probes import planted

from glasshouse.server.probes.centroids import fit_centroids
from glasshouse.server.probes.difference_in_means import DifferenceInMeans
from glasshouse.server.probes.directions import DirectionMethod, compute_directions
from glasshouse.server.probes.examples import LabelledActivations, PairedActivations
from glasshouse.server.probes.mass_mean import MassMean
from glasshouse.server.probes.moments import Moments
from glasshouse.server.probes.paired import ContrastiveActivations, PairedDifferencePCA
from glasshouse.server.types.errors import InvalidArgument

PAIRED = [m for m in DirectionMethod if m.needs_pairs]
LABELLED = [m for m in DirectionMethod if not m.needs_pairs]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# Whitening divides by the noise and k-means sees no labels: where the noise is isotropic all find the same direction.
def isotropic(strength: float = 4.0, n: int = 8000) -> LabelledActivations:
    labels = (np.arange(n) % 2).astype(np.int64)
    rows = np.random.default_rng(5).normal(size=(n, planted.WIDTH)) + 5.0
    return LabelledActivations(
        activations={"blocks.0.hook_resid_post": rows + strength * labels[:, None] * planted.direction()},
        labels=labels,
        label_names=("no", "yes"),
    )


@pytest.mark.parametrize("method", LABELLED)
def test_recovers_a_planted_direction(method: DirectionMethod) -> None:
    report = compute_directions(isotropic(), method)
    found = report.directions[report.best]
    assert cosine(found.vector, planted.direction()) >= 0.99
    figures = report.held_out[report.best]
    assert figures.auroc.value >= 0.99
    assert figures.accuracy.value >= 0.96
    assert figures.effect_size > 3.5
    assert np.isclose(np.linalg.norm(found.unit), 1.0)


@pytest.mark.parametrize("method", [DirectionMethod.CAA, DirectionMethod.PCA])
def test_recovers_a_planted_direction_from_pairs(method: DirectionMethod) -> None:
    report = compute_directions(planted.pairs(), method)
    assert cosine(report.directions[report.best].vector, planted.direction()) >= 0.99
    assert report.held_out[report.best].auroc.value >= 0.99
    # No pair is torn apart.
    train = set((report.split.train % 500).tolist())
    assert not train & set((report.split.held_out % 500).tolist())


def test_centring_takes_the_mean_difference_away() -> None:
    report = compute_directions(planted.pairs(), DirectionMethod.PCA_CENTRED)
    assert abs(cosine(report.directions[report.best].vector, planted.direction())) < 0.7


def test_names_the_best_layer() -> None:
    report = compute_directions(planted.examples(), DirectionMethod.DIFFERENCE_IN_MEANS)
    assert report.best == planted.POINTS[1]
    areas = [report.held_out[name].auroc.value for name in planted.POINTS]
    assert areas[1] > areas[2] > areas[0]


@pytest.mark.parametrize("method", LABELLED)
def test_meaningless_labels_are_at_chance(method: DirectionMethod) -> None:
    labels = np.random.default_rng(8).permutation(np.arange(1200) % 2).astype(np.int64)
    examples = LabelledActivations(
        activations={"x": np.random.default_rng(9).normal(size=(1200, 8))},
        labels=labels,
        label_names=("a", "b"),
    )
    area = compute_directions(examples, method, held_out_share=0.5).held_out["x"].auroc
    assert area.low <= 0.5 <= area.high


def test_streams_equal_their_definitions() -> None:
    examples, rng = planted.examples(300), np.random.default_rng(0)
    rows, labels = examples.rows(planted.POINTS[1]), examples.labels
    positive, negative = rows[labels == 1], rows[labels == 0]
    cuts = np.sort(rng.integers(1, 300, size=4))
    means, corrected = DifferenceInMeans(24), MassMean(24, corrected=True)
    for part, label in zip(np.split(rows.astype(np.float32), cuts), np.split(labels, cuts)):
        means.add(part, label)
    for part, label in zip(np.split(rows, cuts), np.split(labels, cuts)):
        corrected.add(part, label)
    theta = positive.mean(0) - negative.mean(0)
    np.testing.assert_allclose(means.direction, theta, atol=1e-4)
    around = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    sigma = around.T @ around / (len(rows) - 2)
    np.testing.assert_allclose(corrected.direction, np.linalg.solve(sigma, theta), rtol=1e-6)
    middle = (positive.mean(0) + negative.mean(0)) / 2
    assert np.isclose(corrected.threshold, middle @ corrected.direction)


def test_float64_accumulation_survives_a_large_mean() -> None:
    rows = np.random.default_rng(1).normal(size=(20_000, 2)).astype(np.float32) + np.float32(4096.0)
    stream = Moments(2, spread=True)
    for part in np.split(rows, 100):
        stream.add(part)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(stream.mean, exact.mean(0), rtol=1e-14)
    assert stream.scatter is not None
    np.testing.assert_allclose(stream.scatter / 19_999, np.cov(exact.T), rtol=1e-9)


@pytest.mark.parametrize("centred", [True, False])
def test_principal_direction_equals_scikit_learn(centred: bool) -> None:
    pairs, name = planted.pairs(200), planted.POINTS[1]
    differences = pairs.positive[name] - pairs.negative[name]
    stream = PairedDifferencePCA(24, centred=centred)
    for part in np.split(np.arange(200), [7, 90]):
        stream.add(pairs.positive[name][part], pairs.negative[name][part])
    if centred:
        expected = PCA(1).fit(differences).components_[0]
    else:
        expected = np.linalg.svd(differences)[2][0]
    expected = expected * np.sign(expected @ differences.mean(0))
    np.testing.assert_allclose(stream.direction, expected, atol=1e-6)
    contrast = ContrastiveActivations(24)
    contrast.add(pairs.positive[name], pairs.negative[name])
    np.testing.assert_allclose(contrast.direction, differences.mean(0), atol=1e-10)


def test_by_hand() -> None:
    stream = DifferenceInMeans(2)
    stream.add(np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 1.0], [6.0, 3.0]]), np.array([0, 0, 1, 1]))
    assert stream.direction.tolist() == [4.0, 2.0]
    # Means (1, 0) and (5, 2): the middle (3, 1) projects to 14.
    assert stream.threshold == 14.0
    clusters = fit_centroids(np.array([[0.0], [1.0], [10.0], [11.0], [12.0]]))
    assert clusters.centroids[:, 0].tolist() == [11.0, 0.5]
    assert np.allclose(clusters.directions[:, 0], [11.0 - 6.8, 0.5 - 6.8])
    vector, threshold = clusters.contrast(np.array([0, 0, 1, 1, 1]))
    assert (vector.tolist(), threshold) == ([10.5], 10.5 * 5.75)


def test_refusals_name_the_trouble() -> None:
    examples = planted.examples(40)
    with pytest.raises(InvalidArgument, match="compares pairs"):
        compute_directions(examples, DirectionMethod.CAA)
    with pytest.raises(InvalidArgument, match="separates two classes"):
        compute_directions(planted.classes(), DirectionMethod.LOGISTIC)
    same = LabelledActivations(
        activations={"x": np.ones((16, 3))}, labels=np.arange(16) % 2, label_names=("a", "b")
    )
    with pytest.raises(InvalidArgument, match="classes coincide at x"):
        compute_directions(same, DirectionMethod.DIFFERENCE_IN_MEANS)
    with pytest.raises(InvalidArgument, match="1 different examples") as caught:
        compute_directions(same, DirectionMethod.K_MEANS)
    assert caught.value.reason == "TOO_FEW_EXAMPLES"
    one_side = PairedActivations(positive={"x": np.ones((9, 3))}, negative={"x": np.ones((9, 4))})
    with pytest.raises(InvalidArgument) as caught:
        compute_directions(one_side, DirectionMethod.CAA)
    assert caught.value.field == "pairs.negative[x]"
    with pytest.raises(InvalidArgument, match="one side of the pairs"):
        PairedActivations(positive={"x": np.ones((9, 3))}, negative={}).check()
