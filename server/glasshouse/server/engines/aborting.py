"""A request's own conditions for ending early (`abort_when`): scores looked at while it runs.

1. Each condition has a readout of its own, with a negative index, so that no caller sees it. It is read, with those of all
   requests, after the edits of the pass.
2. It is shown what was read over the prompt (of a long one after each piece), then at each further position, and ends
   the generation there: the token that the pass at that position predicted is not emitted.

Everything happens in the step that computed the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.conditions import Abort, Condition, ConditionScope, PromptAggregation
from glasshouse.server.types.readouts import (
    Array,
    FeatureActivations,
    FeatureRows,
    ProbeScoreRows,
    ProbeScores,
    PromptReadout,
    ReadoutValue,
)

NOTHING: Mapping[int, ReadoutValue] = {}


class AbortCondition:
    """One condition, its readout, and the column of it that is meant. Lives in the engine's thread."""

    def __init__(
        self,
        index: int,
        condition: Condition,
        aggregation: PromptAggregation,
        readout: PreparedReadout,
        column: int,
    ) -> None:
        self.readout = readout
        self._index, self._condition, self._aggregation = index, condition, aggregation
        self._column = column

    def over_prompt(self, readout: PromptReadout, *, complete: bool) -> Abort | None:
        """Sees the prompt's positions, all of them or those fed until now. The first that passes counts."""
        scores = self._scores_of(readout.values)
        if self._condition.scope is ConditionScope.PROMPT:
            return self._of_prompt(readout.positions, scores) if complete else None
        for position, score in zip(readout.positions, scores.tolist(), strict=True):
            found = self._abort(position, score)
            if found is not None:
                return found
        return None

    def at(self, position: int, value: ReadoutValue) -> Abort | None:
        """Sees what was read at the position of a generated token."""
        if self._condition.scope is ConditionScope.PROMPT:
            return None
        return self._abort(position, self._score_of(value))

    def _of_prompt(self, positions: Sequence[int], scores: Array) -> Abort | None:
        finite = scores[np.isfinite(scores)].astype(np.float64)
        if not len(finite):
            return None
        match self._aggregation:
            case PromptAggregation.MAX:
                value = finite.max()
            case PromptAggregation.MEAN:
                value = finite.mean()
            case PromptAggregation.LAST:
                value = scores[-1]
        return self._abort(positions[-1], float(value))

    def _abort(self, position: int, score: float) -> Abort | None:
        above, threshold = self._condition.above is not None, self._condition.threshold
        if not math.isfinite(score) or not (score > threshold if above else score < threshold):
            return None
        return Abort(condition=self._index, position=position, score=score, threshold=threshold)

    def _scores_of(self, values: object) -> Array:
        if isinstance(values, ProbeScoreRows):
            column: Array = values.scores[:, self._column]
            return column
        assert isinstance(values, FeatureRows), "a condition reads a probe or a feature"
        return values.activations

    def _score_of(self, value: ReadoutValue) -> float:
        if isinstance(value, ProbeScores):
            return float(value.scores[self._column])
        assert isinstance(value, FeatureActivations), "a condition reads a probe or a feature"
        return float(value.activations[0])


class AbortConditions:
    """Those of one request. Of several that hold, the earliest position wins, then the first of them."""

    def __init__(self, conditions: Sequence[AbortCondition] = ()) -> None:
        self._by_index = {each.readout.index: each for each in conditions}
        assert len(self._by_index) == len(conditions), "a condition has a readout of its own"

    @property
    def readouts(self) -> tuple[PreparedReadout, ...]:
        """What is to be read for them."""
        return tuple(each.readout for each in self._by_index.values())

    def over_prompt(self, readouts: Sequence[PromptReadout], *, complete: bool = True) -> Abort | None:
        """Sees what was read over the prompt, all of it or the pieces fed until now."""
        found = [
            abort
            for readout in readouts
            if readout.readout in self._by_index
            and (abort := self._by_index[readout.readout].over_prompt(readout, complete=complete)) is not None
        ]
        return min(found, key=lambda abort: abort.position, default=None)

    def at(self, position: int, values: Mapping[int, ReadoutValue]) -> Abort | None:
        """Sees all that was read at one position."""
        for index, each in self._by_index.items():
            value = values.get(index)
            if value is not None and (found := each.at(position, value)) is not None:
                return found
        return None

    def without(self, values: Mapping[int, ReadoutValue]) -> Mapping[int, ReadoutValue]:
        """What the caller asked for."""
        if not self._by_index:
            return values
        return {index: value for index, value in values.items() if index >= 0} or NOTHING
