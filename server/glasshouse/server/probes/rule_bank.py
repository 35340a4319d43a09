"""`aggregation.step` for many rules and many requests at once, in arrays.

Legend: S slots, one a request; M rules; B requests of a step; T positions of one prompt.

1. `take` gives a request a slot, `free` gives it back.
2. `step` takes one score a request and rule: what a decoding step makes. Its numbers are those of `aggregation.step`.
3. `run` takes a prompt's scores at once: the same, but for the last digits of a mean, which is a running sum here.

A score that is masked out, or not finite, changes nothing. Not safe to use from several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from glasshouse.server.probes.aggregation import Aggregation, Rule

Floats = np.ndarray[Any, np.dtype[np.float64]]
Masks = np.ndarray[Any, np.dtype[np.bool_]]
Slots = np.ndarray[tuple[int], np.dtype[np.int64]]

_FIRST_SLOTS = 64


@dataclass(frozen=True)
class Crossing:
    """A threshold was crossed: by the request at `place` of a step (the column of a prompt), under `rule`. `raised`:
    upwards. `aggregate`: the value that crossed.
    """

    place: int
    rule: int
    raised: bool
    score: float
    aggregate: float


class RuleBank:
    """The states of M rules for the requests in flight."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.n_rules = len(rules)
        off = [rule.on_above if rule.off_below is None else rule.off_below for rule in rules]
        self._on_above_M = np.array([rule.on_above for rule in rules])
        self._off_below_M = np.array(off)
        self._plain_M = np.array([rule.off_below is None for rule in rules], dtype=bool)
        self._min_tokens_M = np.array([rule.min_tokens for rule in rules], dtype=np.int64)
        self._rules = tuple(rules)
        self._columns = {
            kind: np.array([i for i, rule in enumerate(rules) if rule.aggregation is kind], dtype=np.int64)
            for kind in Aggregation
        }
        self._weights_M = np.array([rule.weight for rule in rules])
        self._levels_M = np.array([rule.level for rule in rules])
        self._n_SM = np.zeros((0, self.n_rules), dtype=np.int64)
        self._value_SM = np.zeros((0, self.n_rules))
        self._on_SM = np.zeros((0, self.n_rules), dtype=bool)
        self._free: list[int] = []

    def take(self) -> int:
        """A slot in the starting state."""
        if not self._free:
            held, grown = len(self._n_SM), max(_FIRST_SLOTS, 2 * len(self._n_SM))
            more = grown - held
            self._n_SM = np.concatenate([self._n_SM, np.zeros((more, self.n_rules), dtype=np.int64)])
            self._value_SM = np.concatenate([self._value_SM, np.zeros((more, self.n_rules))])
            self._on_SM = np.concatenate([self._on_SM, np.zeros((more, self.n_rules), dtype=bool)])
            self._free = list(range(grown - 1, held - 1, -1))
        slot = self._free.pop()
        self._n_SM[slot], self._value_SM[slot], self._on_SM[slot] = 0, 0.0, False
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back."""
        self._free.append(slot)

    @property
    def n_taken(self) -> int:
        """Slots in use."""
        return len(self._n_SM) - len(self._free)

    def step(self, slots_B: Slots, scores_BM: Floats, mask_BM: Masks) -> list[Crossing]:
        """One score a request and rule, for the requests in `slots_B`; the thresholds crossed by it."""
        use = mask_BM & np.isfinite(scores_BM)
        n, before, on = self._n_SM[slots_B], self._value_SM[slots_B], self._on_SM[slots_B]
        scores = scores_BM if use.all() else np.where(use, scores_BM, 0.0)
        value = np.where(use, self._aggregated(scores, before, n), before)
        n = n + use
        now = np.where(on, self._stays(value), self._rises(value, n)) & use | on & ~use
        self._n_SM[slots_B], self._value_SM[slots_B] = n, value
        if not (now != on).any():
            return []
        self._on_SM[slots_B] = now
        return [
            Crossing(int(b), int(m), bool(now[b, m]), float(scores_BM[b, m]), float(value[b, m]))
            for b, m in zip(*np.nonzero(now != on), strict=True)
        ]

    def run(self, slot: int, scores_TM: Floats, mask_TM: Masks) -> list[Crossing]:
        """The scores of a prompt's positions in order, for the request in `slot`; crossings by position."""
        use_TM = mask_TM & np.isfinite(scores_TM)
        crossings: list[Crossing] = []
        for m, rule in enumerate(self._rules):
            places = np.flatnonzero(use_TM[:, m])
            if not len(places):
                continue
            scores = scores_TM[places, m]
            before, seen, on = (
                float(self._value_SM[slot, m]),
                int(self._n_SM[slot, m]),
                bool(self._on_SM[slot, m]),
            )
            values = _aggregated_over(rule, scores, before, seen)
            counts = seen + 1 + np.arange(len(places))
            rises = (values > rule.on_above) & (counts >= rule.min_tokens)
            falls = values < self._off_below_M[m] if rule.off_below is not None else ~(values > rule.on_above)
            self._n_SM[slot, m], self._value_SM[slot, m] = counts[-1], values[-1]
            at = 0
            while at < len(places):
                wanted = np.flatnonzero((falls if on else rises)[at:])
                if not len(wanted):
                    break
                at += int(wanted[0])
                on = not on
                crossings.append(Crossing(int(places[at]), m, on, float(scores[at]), float(values[at])))
                at += 1
            self._on_SM[slot, m] = on
        crossings.sort(key=lambda crossing: (crossing.place, crossing.rule))
        return crossings

    def _stays(self, value: Floats) -> Masks:
        stays: Masks = np.where(self._plain_M, value > self._on_above_M, ~(value < self._off_below_M))
        return stays

    def _rises(self, value: Floats, n: np.ndarray[Any, Any]) -> Masks:
        rises: Masks = (value > self._on_above_M) & (n >= self._min_tokens_M)
        return rises

    def _aggregated(self, scores: Floats, before: Floats, n: np.ndarray[Any, Any]) -> Floats:
        first = n == 0
        value = np.empty_like(before)
        for kind, columns in self._columns.items():
            if not len(columns):
                continue
            whole = len(columns) == self.n_rules
            s, v, k = (
                (scores, before, n) if whole else (scores[:, columns], before[:, columns], n[:, columns])
            )
            started = first if whole else first[:, columns]
            match kind:
                case Aggregation.MAX:
                    start, later = s, np.maximum(v, s)
                case Aggregation.MEAN:
                    start, later = s, v + (s - v) / (k + 1)
                case Aggregation.EXPONENTIAL:
                    start, later = s, v + self._weights_M[columns] * (s - v)
                case Aggregation.FRACTION_ABOVE:
                    start = (s > self._levels_M[columns]).astype(np.float64)
                    later = v + (start - v) / (k + 1)
            made = np.where(started, start, later)
            if whole:
                return made
            value[:, columns] = made
        return value


def _aggregated_over(rule: Rule, scores: Floats, before: float, seen: int) -> Floats:
    """The aggregate after each of `scores`, of which `seen` came before and made `before`."""
    made: Floats
    match rule.aggregation:
        case Aggregation.MAX:
            made = np.maximum.accumulate(scores)
            return np.maximum(made, before) if seen else made
        case Aggregation.MEAN | Aggregation.FRACTION_ABOVE:
            parts = (
                scores if rule.aggregation is Aggregation.MEAN else (scores > rule.level).astype(np.float64)
            )
            made = (before * seen + np.cumsum(parts)) / (seen + 1 + np.arange(len(parts)))
            return made
        case Aggregation.EXPONENTIAL:
            start = [before] if seen else []
            made = np.fromiter(
                accumulate(
                    [*start, *scores.tolist()], lambda value, score: value + rule.weight * (score - value)
                ),
                dtype=np.float64,
            )
            return made[1:] if seen else made
