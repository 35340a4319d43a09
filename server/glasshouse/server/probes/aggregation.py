"""Scores of a text's tokens made one number, token by token, and a threshold that does not flutter.

Pure state machines: a state is a frozen value, `step` returns the next one, nothing else is kept. A monitor holds one
state a request, and may keep, copy or drop it.

- MAX: the largest score so far.
- MEAN: the mean so far.
- EXPONENTIAL: v <- v + weight * (score - v), starting at the first score.
- FRACTION_ABOVE: the share of scores so far above `level`.

Hysteresis: off becomes on where the aggregate goes above `on_above`, and off again only where it falls below
`off_below`, for `min_tokens` scores seen at the earliest. A score that is not finite changes nothing but its count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


class Aggregation(Enum):
    """What the scores are made into; the value is the name in a monitor's description."""

    MAX = "max"
    MEAN = "mean"
    EXPONENTIAL = "exponential"
    FRACTION_ABOVE = "fraction_above"


class Change(Enum):
    """What a step did to the threshold."""

    NONE = "none"
    RAISED = "raised"
    CLEARED = "cleared"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores are aggregated and when the aggregate counts as on. `weight` is EXPONENTIAL's, in (0, 1]; `level`
    FRACTION_ABOVE's. `off_below` None is `on_above`: no hysteresis.
    """

    aggregation: Aggregation
    on_above: float
    off_below: float | None = None
    weight: float = 0.2
    level: float = 0.5
    min_tokens: int = 1

    def check(self, field: str = "rule") -> Rule:
        """Returns itself; raises `InvalidArgument` for numbers that make no sense."""
        off = self.on_above if self.off_below is None else self.off_below
        wrong = (
            ("on_above", self.on_above, math.isfinite(self.on_above), "give a finite number"),
            ("off_below", off, math.isfinite(off) and off <= self.on_above, "give off_below <= on_above"),
            ("weight", self.weight, 0.0 < self.weight <= 1.0, "give 0 < weight <= 1"),
            ("level", self.level, math.isfinite(self.level), "give a finite number"),
            ("min_tokens", self.min_tokens, self.min_tokens >= 1, "give 1 or more"),
        )
        for name, value, fine, remedy in wrong:
            if not fine:
                raise InvalidArgument(
                    f"{name} {value} is out of range",
                    reason=reasons.VALUE_OUT_OF_RANGE,
                    field=f"{field}.{name}",
                    value=value,
                    remedy=remedy,
                )
        return self


@dataclass(frozen=True, kw_only=True)
class WatchState:
    """`n`: scores taken; `value`: the aggregate (NaN before the first); `on`: the threshold's state."""

    n: int = 0
    value: float = math.nan
    on: bool = False
    n_not_finite: int = 0


START = WatchState()


def step(rule: Rule, state: WatchState, score: float) -> tuple[WatchState, Change]:
    """The state after one more token's score, and whether the threshold was crossed by it."""
    if not math.isfinite(score):
        return replace(state, n_not_finite=state.n_not_finite + 1), Change.NONE
    n, value = state.n + 1, _aggregate(rule, state, score)
    off = rule.on_above if rule.off_below is None else rule.off_below
    if state.on:
        on = not value < off if rule.off_below is not None else value > off
    else:
        on = n >= rule.min_tokens and value > rule.on_above
    change = Change.NONE if on == state.on else Change.RAISED if on else Change.CLEARED
    return WatchState(n=n, value=value, on=on, n_not_finite=state.n_not_finite), change


def _aggregate(rule: Rule, state: WatchState, score: float) -> float:
    first = state.n == 0
    match rule.aggregation:
        case Aggregation.MAX:
            return score if first else max(state.value, score)
        case Aggregation.MEAN:
            return score if first else state.value + (score - state.value) / (state.n + 1)
        case Aggregation.EXPONENTIAL:
            return score if first else state.value + rule.weight * (score - state.value)
        case Aggregation.FRACTION_ABOVE:
            above = float(score > rule.level)
            return above if first else state.value + (above - state.value) / (state.n + 1)
