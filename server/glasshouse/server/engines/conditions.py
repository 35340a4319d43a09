"""Conditions checked against the model: what is scored, by what, and from where on the answer is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.store import DictionaryStore
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions.conditions import (
    ColumnScore,
    ConditionState,
    FeatureScore,
    PreparedCondition,
    ScoreOf,
    affine_score,
    logit,
)
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.interventions.plan import touched
from glasshouse.server.probes.concepts import HeldProbe
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.types.conditions import (
    Condition,
    ConditionScope,
    FeatureColumn,
    ProbeColumn,
    ProbeOutput,
    PromptAggregation,
)
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.wire import reasons

from .concepts import Concepts, DeviceProbes

UNEMBED = "unembed"


@dataclass(frozen=True, eq=False, kw_only=True)
class Measure:
    """How a condition is scored: `limit` in units of `score`. `identity` says what is scored, by content."""

    score: ScoreOf
    limit: float
    points: tuple[HookPoint, ...]
    pooling: Pooling
    identity: tuple[object, ...]
    resources: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class FoundCondition:
    """A condition ready to plan; the edit under it applies from position `start` on."""

    prepared: PreparedCondition
    start: int
    identity: str
    resources: tuple[str, ...]

    def reach(self, positions: ResolvedPositions, field: str) -> ResolvedPositions:
        """Those of an edit's `positions` at which the answer is known.

        Raises:
            InvalidArgument: none of them.
        """
        reached = positions.limited(self.start)
        if reached.ranges == positions.ranges:
            return positions
        if reached.empty:
            raise InvalidArgument(
                f"the condition is known from position {self.start} on, the edit is to be made before",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=f"positions before {self.start}",
                remedy=f"edit positions from {self.start} on, or ask at each position",
            )
        return reached


@dataclass(frozen=True, kw_only=True)
class ConditionPreparation:
    """Checks conditions against one model."""

    table: HookTable
    device: torch.device
    dictionaries: DictionaryStore
    probes: DeviceProbes

    def measure(self, condition: Condition, concepts: Concepts, field: str) -> Measure:
        """What the condition's source is on this model.

        Raises:
            InvalidArgument: a label that the probe lacks, or must have.
            NotFound: no such dictionary or feature.
            FailedPrecondition: a probe or dictionary that does not fit the model, or scores logits.
        """
        match condition.source:
            case ProbeColumn():
                held = concepts.probes[condition.source.probe]
                measure = self._probe(condition, condition.source, held, f"{field}.probe")
            case FeatureColumn():
                measure = self._feature(condition, condition.source, f"{field}.feature")
        for point in measure.points:
            if point.name == UNEMBED:
                raise FailedPrecondition(
                    "a condition cannot be read from the logits",
                    reason=reasons.HOOK_POINT_NOT_READABLE,
                    field=field,
                    value=point.name,
                    remedy="read it at a point of a block, or at ln_final.hook_normalized",
                )
        return measure

    def _probe(self, condition: Condition, source: ProbeColumn, held: HeldProbe, field: str) -> Measure:
        points = self.probes.points(held, f"{field}.probe")
        column = held.probe.column(source.label, field=f"{field}.label")
        affine = affine_score(held.probe, column, source.output)
        # A mean of probabilities is no mean of log-odds.
        averaged = condition.aggregation is PromptAggregation.MEAN and source.output is ProbeOutput.SCORE
        score: ScoreOf
        if affine is None or averaged:
            score = ColumnScore(self.probes.of(held), column, source.output)
            limit = condition.threshold
        else:
            score, slope, offset = affine[0].to(self.device), affine[1], affine[2]
            threshold = condition.threshold
            limit = threshold if source.output is ProbeOutput.MARGIN else (logit(threshold) - offset) / slope
        return Measure(
            score=score,
            limit=limit,
            points=points,
            pooling=held.probe.facts.pooling,
            identity=("probe", held.content_hash, column, source.output.value),
            resources=(held.name,),
        )

    def _feature(self, condition: Condition, source: FeatureColumn, field: str) -> Measure:
        held = self.dictionaries.get(source.dictionary, field=f"{field}.dictionary").live(
            f"{field}.dictionary"
        )
        dictionary = held.dictionary
        dictionary.check_feature_ids(
            torch.tensor([source.feature], dtype=torch.int64), field=f"{field}.feature"
        )
        at = _source_point(dictionary, source.feature)
        return Measure(
            score=FeatureScore(dictionary, source.feature, at),
            limit=condition.threshold,
            points=held.points_in if at is None else (held.points_in[at],),
            pooling=Pooling.TOKEN,
            identity=("feature", dictionary.facts.name, source.feature),
        )

    def of_edit(
        self,
        condition: Condition,
        concepts: Concepts,
        *,
        positions: ResolvedPositions,
        written: tuple[HookPoint, ...],
        n_prompt: int,
        field: str,
    ) -> FoundCondition:
        """The condition of an edit that writes at `written`; `positions` are those it looks at.

        Raises:
            InvalidArgument: it is known too late for the edit, or looks at no position.
        """
        measure = self.measure(condition, concepts, field)
        first = min(written, key=lambda point: self.table.position(point.name))
        last = max(measure.points, key=lambda point: self.table.position(point.name))
        lagged = self.table.position(last.name) > self.table.position(first.name)
        scope = condition.scope
        if lagged and scope is ConditionScope.POSITION:
            raise InvalidArgument(
                f"the score is read at {last.name}, which comes after the edit at {first.name}",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=last.name,
                remedy=f"edit at {last.name} or later, read the score earlier, or ask over the prompt or latched",
            )
        if scope is ConditionScope.PROMPT:
            positions = positions.limited(0, n_prompt)
        check_looks(condition, positions, field)
        aggregation = aggregation_of(condition, measure.pooling)
        start = 0
        if lagged:
            start = n_prompt
        elif scope is ConditionScope.PROMPT:
            start = n_prompt - 1
        side = 1.0 if condition.below is None else -1.0
        identity = (
            measure.identity,
            condition.above,
            condition.below,
            scope.value,
            aggregation.value if scope is ConditionScope.PROMPT else "",
            lagged,
            positions.ranges,
            sorted(positions.excluded),
            sorted(positions.excluded_token_ids),
        )
        pools = measure.pooling in (Pooling.MEAN, Pooling.MAX)
        prepared = PreparedCondition(
            points=measure.points,
            score=measure.score,
            limit=measure.limit,
            side=side,
            scope=scope,
            aggregation=aggregation,
            positions=positions,
            lagged=lagged,
            pool=RunningPool(measure.pooling) if pools else None,
            state=ConditionState.empty(aggregation, self.device),
        )
        return FoundCondition(
            prepared=prepared, start=start, identity=repr(identity), resources=measure.resources
        )


class EditConditions:
    """The conditions of one request's edits, in order. Two edits under the same condition share it, unless what is written
    between them may change its answer.
    """

    def __init__(self, preparation: ConditionPreparation, concepts: Concepts, n_prompt: int) -> None:
        self._preparation, self._concepts, self._n_prompt = preparation, concepts, n_prompt
        self._found: dict[object, FoundCondition] = {}
        self._writes: Counter[str] = Counter()

    def of(
        self,
        condition: Condition,
        positions: ResolvedPositions,
        written: tuple[HookPoint, ...],
        field: str,
    ) -> FoundCondition:
        """The condition of the next edit, which writes at `written`."""
        found = self._preparation.of_edit(
            condition,
            self._concepts,
            positions=positions,
            written=written,
            n_prompt=self._n_prompt,
            field=field,
        )
        before = tuple(self._writes[point.name] for point in found.prepared.points)
        return self._found.setdefault((found.identity, before), found)

    def written(self, edit: PreparedIntervention) -> None:
        """Takes note of an edit's turns at its hook points."""
        self._writes.update(touched(edit))


def check_looks(condition: Condition, positions: ResolvedPositions, field: str) -> None:
    """Raises `InvalidArgument` where a condition looks at no position."""
    if positions.empty:
        where = "of the prompt " if condition.scope is ConditionScope.PROMPT else ""
        raise InvalidArgument(
            f"the condition looks at no position {where}that is fed",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.positions",
            value="0 positions",
            remedy=f"look at positions {where}that are fed",
        )


def aggregation_of(condition: Condition, pooling: Pooling) -> PromptAggregation:
    """How a prompt's scores become one: as asked, else by whether the probe pools over positions itself."""
    if condition.aggregation is not None:
        return condition.aggregation
    return PromptAggregation.MAX if pooling is Pooling.TOKEN else PromptAggregation.LAST


def _source_point(dictionary: Dictionary, feature: int) -> int | None:
    """The input point of a cross-layer transcoder's feature; None where all are read."""
    if dictionary.facts.kind != "cross_layer_transcoder":
        return None
    return dictionary.facts.group_of(feature)[0]
