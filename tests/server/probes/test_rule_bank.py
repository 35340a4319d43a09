"""Rules in arrays against the same rules one score at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glasshouse.server.probes.aggregation import START, Aggregation, Change, Rule, WatchState, step
from glasshouse.server.probes.rule_bank import RuleBank


def rules() -> list[Rule]:
    return [
        Rule(aggregation=aggregation, on_above=0.55, off_below=off, weight=0.3, level=0.5, min_tokens=wait)
        for aggregation in Aggregation
        for off in (None, 0.45)
        for wait in (1, 4)
    ]


def scores(n_steps: int, n_requests: int, n_rules: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = np.clip(0.5 + 0.12 * rng.standard_normal((n_steps, n_requests, n_rules)), 0, 1)
    made[rng.random(made.shape) < 0.05] = np.nan
    made[rng.random(made.shape) < 0.02] = np.inf
    return made


def expected(rule: Rule, state: WatchState, score: float, counted: bool) -> tuple[WatchState, Change]:
    return step(rule, state, score) if counted else (state, Change.NONE)


def test_steps_are_those_of_the_rule_alone() -> None:
    ours, n_requests = rules(), 7
    bank = RuleBank(ours)
    slots = np.array([bank.take() for _ in range(n_requests)])[::-1].copy()
    states = [[START] * len(ours) for _ in range(n_requests)]
    counted = np.random.default_rng(5).random((60, n_requests, len(ours))) < 0.8
    n_crossings = 0
    for scored, mask in zip(scores(60, n_requests, len(ours), seed=1), counted, strict=True):
        found = {(c.place, c.rule): c for c in bank.step(slots, scored, mask)}
        n_crossings += len(found)
        for b in range(n_requests):
            for m, rule in enumerate(ours):
                states[b][m], change = expected(rule, states[b][m], float(scored[b, m]), bool(mask[b, m]))
                crossing = found.pop((b, m), None)
                assert (crossing is None) == (change is Change.NONE)
                if crossing is not None:
                    assert crossing.raised == (change is Change.RAISED)
                    assert crossing.aggregate == states[b][m].value
                    assert crossing.score == scored[b, m]
        assert not found
    assert n_crossings > 50


def test_a_prompt_at_once_is_a_prompt_score_by_score() -> None:
    ours = rules()
    prompt, later = scores(40, 1, len(ours), seed=2)[:, 0], scores(40, 1, len(ours), seed=3)
    mask = np.random.default_rng(6).random(prompt.shape) < 0.7
    at_once, one_by_one = RuleBank(ours), RuleBank(ours)
    slot, other = at_once.take(), one_by_one.take()
    # In two pieces, as a long prompt is fed.
    found = [
        (c.place + start, c.rule, c.raised, c.score)
        for start, stop in ((0, 25), (25, 40))
        for c in at_once.run(slot, prompt[start:stop], mask[start:stop])
    ]
    wanted = [
        (place, c.rule, c.raised, c.score)
        for place in range(40)
        for c in one_by_one.step(np.array([other]), prompt[place][None], mask[place][None])
    ]
    assert found == wanted and len(wanted) > 10
    everyone = np.ones((1, len(ours)), dtype=bool)
    for scored in later:
        after = at_once.step(np.array([slot]), scored, everyone)
        same = one_by_one.step(np.array([other]), scored, everyone)
        assert [(c.rule, c.raised) for c in after] == [(c.rule, c.raised) for c in same]
        assert [c.aggregate for c in after] == pytest.approx([c.aggregate for c in same], abs=1e-12)


def test_slots_start_anew_and_are_found_again() -> None:
    bank = RuleBank([Rule(aggregation=Aggregation.MAX, on_above=0.5)])
    taken = [bank.take() for _ in range(200)]
    assert len(set(taken)) == 200 and bank.n_taken == 200
    one = np.ones((1, 1), dtype=bool)
    assert bank.step(np.array(taken[:1]), np.array([[0.9]]), one)
    bank.free(taken[0])
    assert bank.take() == taken[0]
    assert not bank.step(np.array(taken[:1]), np.array([[math.nan]]), one)
    assert bank.step(np.array(taken[:1]), np.array([[0.9]]), one)[0].raised


@pytest.mark.parametrize("bar", [0.7, 0.9])
def test_largest_scores_alone_may_wait(bar: float) -> None:
    """Rules of largest scores, unmasked, as most monitors are: what was put off is not forgotten."""
    ours = [Rule(aggregation=Aggregation.MAX, on_above=bar, off_below=bar / 2)] * 3
    bank = RuleBank(ours)
    every = [np.array([bank.take() for _ in range(4)]), np.array([bank.take() for _ in range(2)])]
    states = {int(slot): [START] * 3 for slots in every for slot in slots}
    n_crossings = 0
    for index, scored in enumerate(scores(400, 4, 3, seed=9)):
        # Batches change, and change back.
        slots = every[(index // 150) % 2]
        scored = scored[: len(slots)] * 0.999 if index < 300 else scored[: len(slots)]
        found = {(c.place, c.rule): c for c in bank.step(slots, scored)}
        n_crossings += len(found)
        for b, slot in enumerate(slots):
            for m, rule in enumerate(ours):
                state, change = step(rule, states[int(slot)][m], float(scored[b, m]))
                states[int(slot)][m] = state
                crossing = found.pop((b, m), None)
                assert (crossing is None) == (change is Change.NONE)
                if crossing is not None:
                    assert crossing.aggregate == state.value
        assert not found
    assert n_crossings
    slot = int(every[0][0])
    bank.run(slot, np.full((1, 3), np.nan), np.ones((1, 3), dtype=bool))
    assert bank._value_SM[slot].tolist() == [state.value for state in states[slot]]
