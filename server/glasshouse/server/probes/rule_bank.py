"""`aggregation.step` for many rules and many requests at once, in arrays.

Legend: S slots, one a request; M rules; B requests of a step; T positions of one prompt.

1. `take` gives a request a slot, `free` gives it back.
2. `step` takes one score a request and rule: what a decoding step makes. Its numbers are those of `aggregation.step`.
3. `run` takes a prompt's scores at once: the same to the last digit, in whatever pieces the prompt comes.

A score that is masked out, or not finite, changes nothing. Not safe to use from several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasshouse.server.probes.aggregation import Aggregation, Rule

Floats = np.ndarray[Any, np.dtype[np.float64]]
Masks = np.ndarray[Any, np.dtype[np.bool_]]
Slots = np.ndarray[tuple[int], np.dtype[np.int64]]

_FIRST_SLOTS = 64
_MOST_PENDING = 64


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
        kinds = {rule.aggregation for rule in rules}
        self._only = kinds.pop() if len(kinds) == 1 else None
        # How many scores there were is kept where a rule asks.
        self._waits = any(rule.min_tokens > 1 for rule in rules)
        self._counts = self._waits or self._only is not Aggregation.MAX
        self._weights_M = np.array([rule.weight for rule in rules])
        self._levels_M = np.array([rule.level for rule in rules])
        # Before the first score; a mean of nothing is 0 and weighs nothing.
        self._start_M = np.array(
            [-np.inf if rule.aggregation is Aggregation.MAX else 0.0 for rule in rules], dtype=np.float64
        )
        self._n_SM = np.zeros((0, self.n_rules), dtype=np.int64)
        self._value_SM = np.zeros((0, self.n_rules))
        self._on_SM = np.zeros((0, self.n_rules), dtype=bool)
        self._free: list[int] = []
        # Of the last step, not yet put back: the next one is nearly always of the same requests.
        self._held: tuple[Slots, Floats, np.ndarray[Any, Any]] | None = None
        # Scores of the held requests that no largest one has been made of yet.
        self._pending: list[Floats] = []
        self._lazy = self._only is Aggregation.MAX and not self._waits
        # How many states are on.
        self._n_on = 0

    def take(self) -> int:
        """A slot in the starting state."""
        self._put_back()
        if not self._free:
            held, grown = len(self._n_SM), max(_FIRST_SLOTS, 2 * len(self._n_SM))
            more = grown - held
            self._n_SM = np.concatenate([self._n_SM, np.zeros((more, self.n_rules), dtype=np.int64)])
            self._value_SM = np.concatenate([self._value_SM, np.zeros((more, self.n_rules))])
            self._on_SM = np.concatenate([self._on_SM, np.zeros((more, self.n_rules), dtype=bool)])
            self._free = list(range(grown - 1, held - 1, -1))
        slot = self._free.pop()
        self._n_on -= int(self._on_SM[slot].sum())
        self._n_SM[slot], self._value_SM[slot], self._on_SM[slot] = 0, self._start_M, False
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back."""
        self._free.append(slot)

    @property
    def n_taken(self) -> int:
        """Slots in use."""
        return len(self._n_SM) - len(self._free)

    def step(self, slots_B: Slots, scores_BM: Floats, mask_BM: Masks | None = None) -> list[Crossing]:
        """One score a request and rule, for the requests in `slots_B`; the thresholds crossed by it. No mask: all count.

        Called at every step of a decoding batch: each of its few array operations is paid for there.
        """
        if self._held is None or self._held[0] is not slots_B:
            self._put_back()
            self._held = slots_B, self._value_SM[slots_B], self._n_SM[slots_B]
        waits = self._lazy and mask_BM is None and not self._n_on
        # Below every threshold a largest score is of no interest until one is passed.
        if waits and not (scores_BM > self._on_above_M).any():
            self._pending.append(scores_BM)
            if len(self._pending) == _MOST_PENDING:
                self._fold()
            return []
        self._fold()
        _, before, n = self._held
        if mask_BM is None and np.isfinite(scores_BM).all():
            use, scores = None, scores_BM
        else:
            everything = np.isfinite(scores_BM)
            use = everything if mask_BM is None else mask_BM & everything
            scores = np.where(use, scores_BM, 0.0)
        value = self._aggregated(scores, before, n)
        if use is not None:
            value = np.where(use, value, before)
        if self._counts:
            n = n + (1 if use is None else use)
        self._held = slots_B, value, n
        rises = value > self._on_above_M
        if self._waits:
            rises &= n >= self._min_tokens_M
        if not self._n_on:
            now = rises if use is None else rises & use
            if not now.any():
                return []
            on = np.zeros_like(now)
        else:
            on = self._on_SM[slots_B]
            stays = np.where(self._plain_M, value > self._on_above_M, ~(value < self._off_below_M))
            now = np.where(on, stays, rises)
            if use is not None:
                now = np.where(use, now, on)
            if (now == on).all():
                return []
        self._on_SM[slots_B] = now
        self._n_on += int(now.sum()) - int(on.sum())
        return [
            Crossing(int(b), int(m), bool(now[b, m]), float(scores_BM[b, m]), float(value[b, m]))
            for b, m in zip(*np.nonzero(now != on), strict=True)
        ]

    def run(self, slot: int, scores_TM: Floats, mask_TM: Masks) -> list[Crossing]:
        """The scores of a prompt's positions in order, for the request in `slot`; crossings by position."""
        self._put_back()
        use_TM = mask_TM & np.isfinite(scores_TM)
        rows, columns = np.flatnonzero(use_TM.any(1)), np.flatnonzero(use_TM.any(0))
        if not len(columns):
            return []
        # Nearly always the same positions count for every rule: then all of them take them at once.
        together = self._only is not None and bool(use_TM[np.ix_(rows, columns)].all())
        parts = [columns] if together else [columns[place : place + 1] for place in range(len(columns))]
        crossings: list[Crossing] = []
        for part in parts:
            places = rows if together else np.flatnonzero(use_TM[:, part[0]])
            crossings += self._run_together(slot, part, places, scores_TM[np.ix_(places, part)])
        crossings.sort(key=lambda crossing: (crossing.place, crossing.rule))
        return crossings

    def _run_together(
        self, slot: int, columns: np.ndarray[Any, Any], places: np.ndarray[Any, Any], scores_TM: Floats
    ) -> list[Crossing]:
        """The scores at `places`, all of which count, under the rules `columns` of one aggregation."""
        kind = self._rules[columns[0]].aggregation
        before, seen = self._value_SM[slot, columns], self._n_SM[slot, columns]
        values_TM = _many_more(
            kind, scores_TM, before, seen, self._weights_M[columns], self._levels_M[columns]
        )
        self._value_SM[slot, columns], self._n_SM[slot, columns] = values_TM[-1], seen + len(places)
        rises_TM = values_TM > self._on_above_M[columns]
        if self._waits:
            counts_TM = seen + 1 + np.arange(len(places))[:, None]
            rises_TM &= counts_TM >= self._min_tokens_M[columns]
        ons = self._on_SM[slot, columns]
        crossings: list[Crossing] = []
        for m in np.flatnonzero(ons | rises_TM.any(0)).tolist():
            rule, on = int(columns[m]), bool(ons[m])
            values, rises = values_TM[:, m], rises_TM[:, m]
            if self._plain_M[rule]:
                falls = ~(values > self._on_above_M[rule])
            else:
                falls = values < self._off_below_M[rule]
            at = 0
            while at < len(places):
                wanted = np.flatnonzero((falls if on else rises)[at:])
                if not len(wanted):
                    break
                at += int(wanted[0])
                on = not on
                crossings.append(
                    Crossing(int(places[at]), rule, on, float(scores_TM[at, m]), float(values[at]))
                )
                at += 1
            self._n_on += int(on) - int(ons[m])
            self._on_SM[slot, rule] = on
        return crossings

    def _fold(self) -> None:
        if self._pending and self._held is not None:
            slots_B, value, n = self._held
            # What is not finite here is NaN or minus infinity, neither of which is the larger.
            self._held = slots_B, np.fmax.reduce([value, *self._pending]), n
        self._pending.clear()

    def _put_back(self) -> None:
        self._fold()
        if self._held is not None:
            slots_B, value, n = self._held
            self._value_SM[slots_B], self._n_SM[slots_B] = value, n
            self._held = None

    def _aggregated(self, scores: Floats, before: Floats, n: np.ndarray[Any, Any]) -> Floats:
        if self._only is not None:
            return _one_more(self._only, scores, before, n, self._weights_M, self._levels_M)
        value = np.empty_like(before)
        for kind, columns in self._columns.items():
            if len(columns):
                value[:, columns] = _one_more(
                    kind,
                    scores[:, columns],
                    before[:, columns],
                    n[:, columns],
                    self._weights_M[columns],
                    self._levels_M[columns],
                )
        return value


def _one_more(
    kind: Aggregation, s: Floats, v: Floats, n: np.ndarray[Any, Any], weights: Floats, levels: Floats
) -> Floats:
    """The aggregate `v` of `n` scores with one more."""
    match kind:
        case Aggregation.MAX:
            return np.maximum(v, s)
        case Aggregation.MEAN:
            mean: Floats = v + (s - v) / (n + 1)
            return mean
        case Aggregation.EXPONENTIAL:
            return np.where(n == 0, s, v + weights * (s - v))
        case Aggregation.FRACTION_ABOVE:
            share: Floats = v + ((s > levels) - v) / (n + 1)
            return share


def _many_more(
    kind: Aggregation,
    scores_TM: Floats,
    v: Floats,
    n: np.ndarray[Any, Any],
    weights: Floats,
    levels: Floats,
) -> Floats:
    """The aggregate `v` (M,) of `n` scores after each of T more."""
    if kind is Aggregation.MAX:
        largest: Floats = np.maximum(np.maximum.accumulate(scores_TM, axis=0), v)
        return largest
    # One after the other, as steps do it: the numbers do not depend on the pieces that a prompt came in.
    values_TM = np.empty(scores_TM.shape)
    for t, scores in enumerate(scores_TM):
        values_TM[t] = v = _one_more(kind, scores, v, n + t, weights, levels)
    return values_TM
