"""Edits under conditions: scores compared with thresholds inside the forward pass, a mask of where an edit applies.

1. A condition is measured at its hook points, when the turn of its intervention comes there: the activations of the
   positions it looks at are scored by a probe or by a dictionary's feature. Conditions of a pass that read the same hook
   points are measured together.
2. A probe that is one affine map is compared in log-odds: p > t is margin > (logit(t) - offset) / slope under Platt's
   calibration, with the order reversed for a negative slope. A thousand such probes are one gather and one product.
3. The scope makes scores into answers: each position's own; the prompt's maximum, mean or last; or the first that
   passes, and ever after. What must outlive a pass is the condition's state, which lies on the device.
4. The edit computes all its cells and keeps the activation where the answer is no. Nothing waits for the device.

Legend: R conditions measured together, M cells looked at, N cells edited, D width of what is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary, stacked
from glasshouse.server.probes.calibration import PlattScaling
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import PoolStack, RunningPool
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.types.conditions import ConditionScope, ProbeOutput, PromptAggregation
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import ResolvedPositions


@dataclass(frozen=True, eq=False)
class AffineScore:
    """x . weights + bias, float32 (D,) and (): it rises with the score that is meant."""

    weights: Tensor
    bias: Tensor

    def to(self, device: torch.device) -> AffineScore:
        """The same on another device."""
        return AffineScore(self.weights.to(device), self.bias.to(device))


@dataclass(frozen=True, eq=False)
class ColumnScore:
    """One column of a probe, as its output says."""

    probe: ServedProbe
    column: int
    output: ProbeOutput


@dataclass(frozen=True, eq=False)
class FeatureScore:
    """The activation of a dictionary's feature. `source`: the input point it reads, where it reads one of several."""

    dictionary: Dictionary
    feature: int
    source: int | None = None


@dataclass(frozen=True, eq=False)
class Switch:
    """No score of its own: the condition looks at nothing, and holds once its `state.passed` is set from outside."""


ScoreOf = AffineScore | ColumnScore | FeatureScore | Switch


@dataclass(eq=False)
class ConditionState:
    """What outlives a pass. `passed` bool (); `total` float64 (), the maximum, sum or last score so far; `seen` int64 (),
    how many.
    """

    passed: Tensor
    total: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, aggregation: PromptAggregation, device: torch.device) -> ConditionState:
        """Before the first position."""
        start = -math.inf if aggregation is PromptAggregation.MAX else 0.0
        return cls(
            torch.zeros((), dtype=torch.bool, device=device),
            torch.full((), start, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )


@dataclass(eq=False, kw_only=True)
class PreparedCondition:
    """A condition of one request, ready to plan: it holds where `side` (1 or -1) times the score is greater than `side`
    times `limit`. `lagged`: its edits come earlier in the pass than its hook points, and see the answer of the pass before.
    """

    points: tuple[HookPoint, ...]
    score: ScoreOf
    limit: float
    side: float
    scope: ConditionScope
    aggregation: PromptAggregation
    positions: ResolvedPositions
    lagged: bool
    pool: RunningPool | None
    state: ConditionState = field(repr=False)

    @property
    def kind(self) -> tuple[object, ...]:
        """Conditions of one kind at the same turn are measured together."""
        match self.score:
            case AffineScore(weights=weights):
                how: tuple[object, ...] = ("affine", weights.shape)
            case ColumnScore(probe=probe, output=output):
                how = ("column", id(probe), output)
            case FeatureScore(dictionary=dictionary, source=source):
                how = ("feature", id(dictionary), source)
            case Switch():
                how = ("switch",)
        pooling = None if self.pool is None else self.pool.pooling
        names = tuple(point.name for point in self.points)
        return (names, how, pooling, self.scope, self.aggregation, self.lagged)


def affine_score(
    probe: ServedProbe, column: int, output: ProbeOutput
) -> tuple[AffineScore, float, float] | None:
    """A probe's column as a product that rises with its score, where it is one; with (slope, offset) such that the
    score's log-odds are slope * product + offset, slope > 0. `probe`: in float64.
    """
    if not probe.is_affine or probe.facts.task is Task.MULTI_CLASS:
        return None
    layer = probe.layers[0]
    weights, bias = layer.weights[:, column], layer.biases[column]
    if output is ProbeOutput.MARGIN or probe.calibration is None:
        return AffineScore(weights.float(), bias.float()), 1.0, 0.0
    if not isinstance(probe.calibration, PlattScaling):
        return None
    slope, offset = float(probe.calibration.slopes[column]), float(probe.calibration.offsets[column])
    if slope == 0.0:
        return None
    sign = math.copysign(1.0, slope)
    return AffineScore((sign * weights).float(), (sign * bias).float()), abs(slope), offset


def logit(probability: float) -> float:
    """log(p / (1 - p)) of p in [0, 1]."""
    if probability in (0.0, 1.0):
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


class _Scorer(Protocol):
    def __call__(self, x_MD: Sequence[Tensor], member_M: Tensor) -> Tensor:
        """Scores (M,) of cells, given as one (M, width) a hook point, by the condition each belongs to."""


def _scorer(members: Sequence[PreparedCondition], device: torch.device, one_each: bool) -> _Scorer:
    first = members[0].score
    match first:
        case AffineScore():
            scores = [member.score for member in members if isinstance(member.score, AffineScore)]
            weights_RD = torch.stack([score.weights for score in scores])
            biases_R = torch.stack([score.bias for score in scores])
            return lambda x, member_M: _products(x, weights_RD, biases_R, member_M, one_each=one_each)
        case ColumnScore(probe=probe, output=output):
            columns = [member.score.column for member in members if isinstance(member.score, ColumnScore)]
            columns_R = torch.tensor(columns, device=device)
            return lambda x, member_M: _column(x, probe, output, columns_R[member_M])
        case FeatureScore(dictionary=dictionary, source=source):
            wanted = [member.score.feature for member in members if isinstance(member.score, FeatureScore)]
            union = sorted(set(wanted))
            ids = torch.tensor(union, dtype=torch.int64, device=device)
            places_R = torch.tensor([union.index(feature) for feature in wanted], device=device)
            return lambda x, member_M: _feature(x, dictionary, source, ids, places_R[member_M])
        case Switch():
            raise AssertionError("a switch looks at nothing")


def _joined(x: Sequence[Tensor]) -> Tensor:
    return x[0] if len(x) == 1 else torch.cat(list(x), dim=1)


def _products(
    x: Sequence[Tensor], weights_RD: Tensor, biases_R: Tensor, member_M: Tensor, *, one_each: bool
) -> Tensor:
    joined = _joined(x)
    if one_each:
        return (joined * weights_RD).sum(-1) + biases_R
    return torch.addmm(biases_R, joined, weights_RD.T).gather(1, member_M[:, None])[:, 0]


def _column(x: Sequence[Tensor], probe: ServedProbe, output: ProbeOutput, columns_M: Tensor) -> Tensor:
    margins = probe.margins(_joined(x))
    scores = probe.score_margins(margins) if output is ProbeOutput.SCORE else margins
    return scores.gather(1, columns_M[:, None])[:, 0]


def _feature(
    x: Sequence[Tensor], dictionary: Dictionary, source: int | None, ids: Tensor, places_M: Tensor
) -> Tensor:
    if source is None:
        read = stacked(list(x))
    else:
        # Features of one source layer read that layer alone: the others' rows may be anything.
        read = x[0].new_zeros((x[0].shape[0], len(dictionary.facts.hook_points_in), x[0].shape[1]))
        read[:, source] = x[0]
    return dictionary.encode_features(read, ids).gather(1, places_M[:, None])[:, 0]


@dataclass(eq=False)
class ConditionCells:
    """The conditions of one group, and the cells (row of the batch, index within the row) they look at."""

    members: list[PreparedCondition] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)

    def add(self, condition: PreparedCondition, row: int, start: int, positions: Sequence[int]) -> None:
        """Takes in a condition of `row`, once, which looks at `positions` of those fed from `start`."""
        if id(condition) in self.places:
            return
        self.places[id(condition)] = len(self.members)
        self.owner.extend([len(self.members)] * len(positions))
        self.members.append(condition)
        self.rows.extend([row] * len(positions))
        self.columns.extend(position - start for position in positions)


class ConditionGroup:
    """Conditions of one kind at one turn: measured together, asked by the edits under them."""

    def __init__(self, cells: ConditionCells, n_columns: int, device: torch.device) -> None:
        first = cells.members[0]
        self.points = first.points
        self.looks = bool(cells.rows)
        self._scope, self._aggregation, self._lagged = first.scope, first.aggregation, first.lagged
        self._n_columns = n_columns
        self._rows_M = torch.tensor(cells.rows, dtype=torch.int64, device=device)
        self._columns_M = torch.tensor(cells.columns, dtype=torch.int64, device=device)
        self._owner_M = torch.tensor(cells.owner, dtype=torch.int64, device=device)
        self._runs = [cells.owner.count(own) for own in range(len(cells.members))]
        self._side_R = torch.tensor([member.side for member in cells.members], device=device)
        self._limit_R = torch.tensor([member.limit for member in cells.members], device=device)
        self._one_each = n_columns == 1 and cells.owner == list(range(len(cells.members)))
        # One cell a member, in the order of the batch's rows: where there are as many rows, the tensor itself.
        self._in_order = self._one_each and cells.rows == list(range(len(cells.rows)))
        self._score = _scorer(cells.members, device, self._one_each) if self.looks else None
        self._places = cells.places
        self._pools = [member.pool for member in cells.members if member.pool is not None]
        self._stack = (
            PoolStack(self._pools, sum(point.width for point in self.points), device)
            if self._pools and self._one_each
            else None
        )
        # The states of all members lie together; each member's goes on being a view of them.
        states = [member.state for member in cells.members]
        self._passed_R = torch.stack([state.passed for state in states])
        self._total_R = torch.stack([state.total for state in states])
        self._seen_R = torch.stack([state.seen for state in states])
        for place, state in enumerate(states):
            state.passed, state.total = self._passed_R[place], self._total_R[place]
            state.seen = self._seen_R[place]
        self._inputs: dict[int, Tensor] = {}
        # Answers of this pass, (R, columns of the batch).
        self._answers_RT = torch.zeros((len(cells.members), n_columns), dtype=torch.bool, device=device)

    def place(self, condition: PreparedCondition) -> int:
        """The index of a member."""
        return self._places[id(condition)]

    def measure(self, tensor_BTW: Tensor, source: int) -> None:
        """Takes the activations at `points[source]`; after the last of them, scores and answers."""
        whole = self._in_order and self._rows_M.shape[0] == tensor_BTW.shape[0]
        cells = tensor_BTW[:, 0] if whole else tensor_BTW[self._rows_M, self._columns_M]
        self._inputs[source] = cells.float()
        if source == len(self.points) - 1:
            assert self._score is not None, "measured without looking"
            x = [self._inputs[index] for index in range(len(self.points))]
            self._inputs.clear()
            self._answer(self._score(self._pooled(x), self._owner_M))

    def _pooled(self, x: list[Tensor]) -> list[Tensor]:
        if not self._pools:
            return x
        joined = _joined(x)
        if self._stack is not None:
            return [self._stack.add(joined)]
        runs = torch.split(joined, self._runs)
        return [torch.cat([pool.add(run) for pool, run in zip(self._pools, runs, strict=True)])]

    def _passes(self, scores: Tensor, side: Tensor, limit: Tensor) -> Tensor:
        return scores.isfinite() & (side * scores > side * limit)

    def _answer(self, scores_M: Tensor) -> None:
        if self._scope is ConditionScope.PROMPT:
            self._aggregate(scores_M)
            return
        if self._one_each:
            holds_RT = self._passes(scores_M, self._side_R, self._limit_R)[:, None]
        else:
            owner_M = self._owner_M
            holds_M = self._passes(scores_M, self._side_R[owner_M], self._limit_R[owner_M])
            holds_RT = torch.zeros_like(self._answers_RT)
            holds_RT[owner_M, self._columns_M] = holds_M
        if self._scope is ConditionScope.LATCHED:
            if self._n_columns > 1:
                holds_RT = holds_RT.cumsum(dim=1) > 0
            holds_RT = holds_RT | self._passed_R[:, None]
            self._passed_R.copy_(holds_RT[:, -1])
        self._answers_RT = holds_RT

    def _aggregate(self, scores_M: Tensor) -> None:
        """Takes scores into the aggregate of each member's prompt; those that are not finite count for nothing."""
        finite_M = scores_M.isfinite()
        scores_M = scores_M.double()
        match self._aggregation:
            case PromptAggregation.MAX:
                self._total_R.scatter_reduce_(
                    0, self._owner_M, scores_M.masked_fill(~finite_M, -torch.inf), "amax"
                )
            case PromptAggregation.MEAN:
                self._total_R.index_add_(0, self._owner_M, scores_M.masked_fill(~finite_M, 0.0))
            case PromptAggregation.LAST:
                # Cells come member by member, by position: the last of each run.
                ends = torch.tensor(self._runs, device=scores_M.device).cumsum(0) - 1
                some = torch.tensor([run > 0 for run in self._runs], device=scores_M.device)
                last = scores_M[ends.clamp_min(0)]
                self._total_R.copy_(torch.where(some, last, self._total_R))
        self._seen_R.index_add_(0, self._owner_M, finite_M.long())
        value_R = self._total_R
        if self._aggregation is PromptAggregation.MEAN:
            value_R = value_R / self._seen_R
        self._passed_R.copy_(
            (self._seen_R > 0) & self._passes(value_R, self._side_R.double(), self._limit_R.double())
        )

    def holds(self, condition: PreparedCondition) -> bool:
        """Whether it is a member."""
        return id(condition) in self._places

    def passed_by(self, condition: PreparedCondition, column: int) -> Tensor:
        """Whether a latched condition had passed by a column of the pass that ran last, bool ()."""
        return self._answers_RT[self.place(condition), column]

    def mask(self, members_N: Tensor, columns_N: Tensor) -> Tensor:
        """Whether the condition of each edited cell holds there, bool (N,)."""
        if self._scope is ConditionScope.PROMPT or self._lagged:
            return self._passed_R[members_N]
        if self._scope is ConditionScope.LATCHED and not self.looks:
            return self._passed_R[members_N]
        return self._answers_RT[members_N, columns_N]


@dataclass(frozen=True, eq=False)
class ConditionMeasurement:
    """A condition group's reading at one of its hook points."""

    group: ConditionGroup
    source: int

    def apply(self, tensor_BTW: Tensor) -> None:
        """Reads; changes nothing."""
        self.group.measure(tensor_BTW, self.source)


class Gate:
    """Which cells of a group of edits their conditions let through, and the count of those."""

    def __init__(
        self,
        group: ConditionGroup,
        members: Sequence[int],
        columns_N: Tensor,
        owner_N: Tensor,
        steered: Sequence[Steered],
    ) -> None:
        self._group = group
        self._members_N = torch.tensor(members, dtype=torch.int64, device=owner_N.device)
        self._columns_N, self._owner_N = columns_N, owner_N
        # What `count` was given last.
        self.last_N1: Tensor | None = None
        # The counts of all edits lie together; each edit's goes on being a view of them.
        self._steered_E = torch.stack([each.count.to(owner_N.device) for each in steered])
        for place, each in enumerate(steered):
            each.count = self._steered_E[place]

    @property
    def owner_N(self) -> Tensor:
        """Which edit of the group each cell belongs to."""
        return self._owner_N

    def open(self) -> Tensor:
        """Where the edits apply in this pass, bool (N, 1). Asked once a pass and hook point: `count` adds it up."""
        return self._group.mask(self._members_N, self._columns_N)[:, None]

    def count(self, open_N1: Tensor) -> None:
        """Books the cells that were edited."""
        self.last_N1 = open_N1
        self._steered_E.index_add_(0, self._owner_N, open_N1[:, 0].long())


@dataclass(eq=False)
class Steered:
    """Positions at which a conditional edit was made: int64 (), on the device."""

    count: Tensor
