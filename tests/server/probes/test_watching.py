"""Drift and aggregation against small cases by hand, and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from glasshouse.server.probes.aggregation import START, Aggregation, Change, Rule, WatchState, step
from glasshouse.server.probes.drift import DriftWatch, ScoreHistogram
from glasshouse.server.types.errors import InvalidArgument


def run(rule: Rule, scores: list[float]) -> tuple[WatchState, list[Change], list[float]]:
    state, changes, values = START, [], []
    for score in scores:
        state, change = step(rule, state, score)
        changes.append(change)
        values.append(state.value)
    return state, changes, values


SCORES = [0.1, 0.9, 0.3, 0.5]
BY_HAND = {
    Aggregation.MAX: [0.1, 0.9, 0.9, 0.9],
    Aggregation.MEAN: [0.1, 0.5, 1.3 / 3, 0.45],
    Aggregation.EXPONENTIAL: [0.1, 0.5, 0.4, 0.45],
    Aggregation.FRACTION_ABOVE: [0.0, 0.5, 1 / 3, 0.25],
}


@pytest.mark.parametrize("aggregation", Aggregation)
def test_aggregates(aggregation: Aggregation) -> None:
    rule = Rule(aggregation=aggregation, on_above=2.0, weight=0.5, level=0.6)
    _, _, values = run(rule, SCORES)
    assert values == pytest.approx(BY_HAND[aggregation])


def test_hysteresis_does_not_flutter() -> None:
    rule = Rule(aggregation=Aggregation.EXPONENTIAL, on_above=0.8, off_below=0.4, weight=1.0)
    none, on, off = Change.NONE, Change.RAISED, Change.CLEARED
    assert run(rule, [0.8, 0.81, 0.5, 0.9, 0.4, 0.39, 0.7, 0.9])[1] == [
        none,
        on,
        none,
        none,
        none,
        off,
        none,
        on,
    ]
    flutter = Rule(aggregation=Aggregation.EXPONENTIAL, on_above=0.8, weight=1.0)
    assert run(flutter, [0.9, 0.8, 0.81])[1] == [on, off, on]


def test_waits_for_tokens_and_skips_what_is_not_finite() -> None:
    rule = Rule(aggregation=Aggregation.MAX, on_above=0.5, min_tokens=3)
    state, changes, _ = run(rule, [0.9, math.nan, 0.1, math.inf, 0.2])
    assert changes == [Change.NONE] * 4 + [Change.RAISED]
    assert (state.n, state.n_not_finite, state.value) == (3, 2, 0.9)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"on_above": math.nan}, "rule.on_above"),
        ({"off_below": 0.6}, "rule.off_below"),
        ({"weight": 0.0}, "rule.weight"),
        ({"level": math.inf}, "rule.level"),
        ({"min_tokens": 0}, "rule.min_tokens"),
    ],
)
def test_rules_that_make_no_sense(changes: dict[str, float], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Rule(**{"aggregation": Aggregation.MAX, "on_above": 0.5, **changes}).check()  # type: ignore[arg-type]
    assert caught.value.field == field


def test_histogram_by_hand() -> None:
    found = ScoreHistogram.of(np.arange(8.0), n_bins=4)
    assert found.edges == (1.75, 3.5, 5.25)
    assert found.counts == (2, 2, 2, 2)
    watch = DriftWatch(found)
    watch.add(np.array([0.0, 0.5, 1.0, 1.5, 1.7, 2.0, 4.0, 100.0, math.nan]))
    drift = watch.read()
    p, q = np.full(4, 2.5) / 10, np.array([5.5, 1.5, 1.5, 1.5]) / 10
    assert math.isclose(drift.population_stability_index, ((q - p) * np.log(q / p)).sum())
    assert math.isclose(drift.ks_statistic, 5 / 8 - 2 / 8)
    assert (drift.n_live, watch.n_not_finite) == (8.0, 1)
    assert ScoreHistogram.from_json(found.to_json()) == found


def test_steady_scores_stay_and_moved_scores_are_seen() -> None:
    rng = np.random.default_rng(0)
    calibration = rng.beta(2, 5, 2000)
    steady, moved = DriftWatch(ScoreHistogram.of(calibration)), DriftWatch(ScoreHistogram.of(calibration))
    same, other = rng.beta(2, 5, 1000), rng.beta(3, 4, 1000)
    for part in np.split(same, 10):
        steady.add(part)
    moved.add(other)
    assert steady.read().population_stability_index < 0.1
    assert steady.read().ks_p_value > 0.01
    assert moved.read().population_stability_index > 0.25
    exact = stats.ks_2samp(calibration, other)
    assert exact.statistic - 1 / 20 <= moved.read().ks_statistic <= exact.statistic
    assert moved.read().ks_p_value < 1e-6


def test_old_scores_fade() -> None:
    histogram = ScoreHistogram.of(np.linspace(0, 1, 100), n_bins=2)
    watch, apart = DriftWatch(histogram, half_life=10), DriftWatch(histogram, half_life=10)
    scores = np.concatenate([np.zeros(500), np.ones(100)])
    watch.add(scores)
    for part in np.split(scores, 60):
        apart.add(part)
    assert watch.read().n_live == pytest.approx(1 / (1 - 0.5**0.1), rel=1e-6)
    assert watch.read().ks_statistic == pytest.approx(apart.read().ks_statistic, rel=1e-9)
    assert watch.read().ks_statistic == pytest.approx(0.5, abs=0.01)


def test_constant_and_hostile_scores() -> None:
    constant = ScoreHistogram.of(np.full(50, 0.5))
    assert constant.counts == (50,)
    watch = DriftWatch(constant)
    assert watch.read().ks_p_value == 1.0
    watch.add(np.array([0.1]))
    assert watch.read().ks_statistic == 0.0
    for scores, message in ((np.ones(3), "do not fill"), (np.array([0.1] * 30 + [math.nan]), "not finite")):
        with pytest.raises(InvalidArgument, match=message):
            ScoreHistogram.of(scores)
    with pytest.raises(InvalidArgument, match="half_life 0"):
        DriftWatch(constant, half_life=0)
    for body in ({}, {"edges": [1.0, 1.0], "counts": [1, 2, 3]}, {"edges": [], "counts": [0]}):
        with pytest.raises(InvalidArgument, match="not a histogram"):
            ScoreHistogram.from_json(body)
