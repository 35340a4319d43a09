"""Conditions: a score passed a threshold. What an edit applies under, and what ends a generation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .selectors import EVERYWHERE, Selector


class ProbeOutput(Enum):
    """What a probe's scores are given as: the probability it states, or its log-odds before calibration."""

    SCORE = "score"
    MARGIN = "margin"


@dataclass(frozen=True, kw_only=True)
class ProbeColumn:
    """One score column of a probe; `label` "" is its only one."""

    probe: str
    label: str = ""
    output: ProbeOutput = ProbeOutput.SCORE


@dataclass(frozen=True, kw_only=True)
class FeatureColumn:
    """One feature of a dictionary; its score is its activation."""

    dictionary: str
    feature: int


class ConditionScope(Enum):
    """Over what a condition is asked: each position by itself, the prompt as one, or from the first position that
    passes on.
    """

    POSITION = "position"
    PROMPT = "prompt"
    LATCHED = "latched"


class PromptAggregation(Enum):
    """How the scores at a prompt's positions become one."""

    MAX = "max"
    MEAN = "mean"
    LAST = "last"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Exactly one of `above` and `below` is the threshold, passed strictly. `aggregation` is PROMPT's; None is LAST for a
    probe that pools over positions itself, else MAX. `positions`: those looked at; elsewhere it does not hold.
    """

    source: ProbeColumn | FeatureColumn
    above: float | None = None
    below: float | None = None
    scope: ConditionScope = ConditionScope.POSITION
    aggregation: PromptAggregation | None = None
    positions: Selector = EVERYWHERE

    @property
    def threshold(self) -> float:
        """The number to pass."""
        threshold = self.below if self.above is None else self.above
        assert threshold is not None, "a condition holds exactly one of above and below"
        return threshold


@dataclass(frozen=True, kw_only=True)
class Abort:
    """What ended a generation before its time: `condition` of `abort_when`, or else `monitor`, a resource name. It passed
    at `position`; the token which that position's forward pass predicted was not emitted.
    """

    condition: int | None = None
    monitor: str = ""
    position: int
    score: float
    threshold: float


class MonitorAction(Enum):
    """What a monitor does when its threshold is passed."""

    OBSERVE = "observe"
    FLAG = "flag"
    STEER = "steer"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class MonitorFlag:
    """A monitor's threshold was passed at `position`, by the aggregate `score`."""

    monitor: str
    position: int
    score: float
    threshold: float
    action: MonitorAction
