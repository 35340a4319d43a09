"""Requests with edits under conditions: planned and run by `interventions.plan`, a padded little batch of their own.

Conditions remember what they saw (a latch, a prompt's aggregate, a running pool), vLLM runs positions again
(preemption, drafts that were rejected): before a request's state is used it is taken back to where its next run
begins. Where that cannot be done the request fails; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.engines.vllm.contract import plan as contract
from glasshouse.server.engines.vllm.contract.clauses import Clause
from glasshouse.server.engines.vllm.contract.messages import RowBlock
from glasshouse.server.interventions.conditions import (
    AffineScore,
    ColumnScore,
    ConditionMeasurement,
    ConditionState,
    FeatureScore,
    PreparedCondition,
    ScoreOf,
    Steered,
)
from glasshouse.server.interventions.edits import PreparedEdit, PreparedIntervention, Primitive, Scalars
from glasshouse.server.interventions.features import PreparedFeatureEdit
from glasshouse.server.interventions.plan import EditPlan, SiteAction, plan_edits
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.types.conditions import ConditionScope, ProbeOutput, PromptAggregation
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.server.types.spans import Span

from .actions import Rows
from .junctions import PointTarget
from .loaded import loaded

Array = np.ndarray
_PRIMITIVES = {
    "add": Primitive.ADD,
    "project": Primitive.PROJECT,
    "rotate": Primitive.ROTATE,
    "replace": Primitive.REPLACE,
}


def point(name: str, width: int) -> HookPoint:
    """A hook point by name: all that planning reads of one."""
    return HookPoint(
        name=name, module_path="", kind="residual", layer=None, width=width, n_heads=0, d_head=0,
        readable=True, writable=True,
    )  # fmt: skip


def positions_of(clause: Clause) -> ResolvedPositions:
    """A clause as planning takes it."""
    return ResolvedPositions(
        ranges=clause.ranges,
        excluded_token_ids=frozenset(clause.excluded_token_ids),
        n_prompt=clause.n_prompt,
    )


def feature_edit(edit: contract.EditPlan, dictionary: Dictionary) -> PreparedFeatureEdit:
    """An edit of features, ready to apply."""
    points_out = tuple(point(name, dictionary.facts.d_out) for name in edit.sites_out)
    return PreparedFeatureEdit(
        index=edit.index,
        kind="features",
        hook_points=points_out,
        positions=positions_of(edit.clause),
        preserve_norm=edit.preserve_norm,
        dictionary=dictionary,
        points_in=tuple(point(name, dictionary.facts.d_in) for name in edit.sites_in),
        points_out=points_out,
        feature_ids=edit.feature_ids,
        factors=edit.factors,
        offsets=edit.offsets,
    )


def plain_edit(edit: contract.EditPlan, vectors_NW: Tensor) -> PreparedEdit:
    """Any other edit, with vectors of its own."""
    row_of: dict[int, int] = {}
    if edit.kind == "replace" and len(vectors_NW) > 1:
        selected = [p for low, high in edit.clause.ranges for p in range(low, high)]
        row_of = {position: row for row, position in enumerate(selected)}
    return PreparedEdit(
        index=edit.index,
        kind=edit.kind,
        hook_points=(point(edit.sites_out[0], vectors_NW.shape[1]),),
        positions=positions_of(edit.clause),
        preserve_norm=edit.preserve_norm,
        primitive=_PRIMITIVES[edit.kind],
        vectors=vectors_NW,
        scalars=Scalars(
            plain=edit.plain,
            scaled=edit.scaled,
            low=-np.inf if edit.low is None else edit.low,
            high=np.inf if edit.high is None else edit.high,
        ),
        row_of=row_of,
    )


def prepared_condition(
    plan: contract.ConditionPlan,
    *,
    width: int,
    device: torch.device,
    dictionaries: Mapping[str, Dictionary],
    probes: Mapping[str, ServedProbe],
) -> PreparedCondition:
    """A condition with a fresh state."""
    score: ScoreOf
    match plan.kind:
        case "affine":
            weights = torch.from_numpy(np.frombuffer(plan.weights, dtype="<f4").copy())
            score = AffineScore(weights, torch.tensor(plan.bias)).to(device)
        case "column":
            output = ProbeOutput.MARGIN if plan.margin else ProbeOutput.SCORE
            score = ColumnScore(loaded(probes, plan.probe, "probe"), plan.column, output)
        case "feature":
            score = FeatureScore(
                loaded(dictionaries, plan.dictionary, "dictionary"), plan.feature, plan.source
            )
    aggregation = PromptAggregation(plan.aggregation)
    return PreparedCondition(
        points=tuple(point(name, width) for name in plan.sites),
        score=score,
        limit=plan.limit,
        side=plan.side,
        scope=ConditionScope(plan.scope),
        aggregation=aggregation,
        positions=positions_of(plan.clause),
        lagged=plan.lagged,
        pool=RunningPool(Pooling(plan.pooling)) if plan.pooling else None,
        state=ConditionState.empty(aggregation, device),
    )


@dataclass(eq=False, kw_only=True)
class ConditionalEdits:
    """The edits of one request that has conditions, all of them, in order, and how far it has run."""

    n_prompt: int
    edits: list[PreparedIntervention]
    conditions: list[PreparedCondition]
    device: torch.device
    frontier: int = 0
    # The last pass: where it began, and the groups that measured in it.
    last_start: int = 0
    last_plan: EditPlan | None = field(default=None, repr=False)

    def ran(self, start: int, count: int, plan: EditPlan) -> None:
        """A pass over these positions has been run, under `plan`."""
        self.last_start, self.frontier, self.last_plan = start, start + count, plan

    def resume(self, start: int) -> None:
        """Takes what conditions remember back to before `start`, where the next pass begins.

        Raises:
            ValueError: that is not known any more.
        """
        if start == self.frontier or self.frontier == 0:
            return
        for condition in self.conditions:
            self._resume(condition, start)

    def _resume(self, condition: PreparedCondition, start: int) -> None:
        first = condition.positions.ranges[0][0] if condition.positions.ranges else start
        if start <= first:
            condition.state = ConditionState.empty(condition.aggregation, self.device)
            if condition.pool is not None:
                condition.pool = RunningPool(condition.pool.pooling)
            return
        if condition.pool is not None:
            raise ValueError(f"a probe that pools over positions cannot be taken back to position {start}")
        match condition.scope:
            case ConditionScope.POSITION:
                return
            case ConditionScope.PROMPT:
                if start >= self.n_prompt:
                    return
            case ConditionScope.LATCHED:
                group = None if self.last_plan is None else _group_of(self.last_plan, condition)
                if group is None:
                    return
                if start > self.last_start:
                    condition.state.passed = group.group.passed_by(
                        condition, start - 1 - self.last_start
                    ).clone()
                    return
        raise ValueError(f"a condition over what came before cannot be taken back to position {start}")


def _group_of(plan: EditPlan, condition: PreparedCondition) -> ConditionMeasurement | None:
    for actions in plan.actions.values():
        for action in actions:
            if isinstance(action, ConditionMeasurement) and action.group.holds(condition):
                return action
    return None


@dataclass(eq=False, kw_only=True)
class PaddedActions:
    """What `interventions.plan` does at one hook point, on these requests' rows laid out as (B, T): padding repeats a
    row and is not written back.
    """

    target: PointTarget
    n_tokens: int
    rows_C: Tensor
    shape: tuple[int, int]
    # Cells that are rows, None where all are.
    valid: Tensor | None
    actions: Sequence[SiteAction]
    members: Sequence[int]

    def __call__(self, x: Tensor, residual: Tensor | None) -> None:
        """Reads and edits."""
        cells = Rows(target=self.target, n_tokens=self.n_tokens, rows_N=self.rows_C).take(x, residual)
        tensor_BTW = cells.view(*self.shape, cells.shape[1])
        for action in self.actions:
            action.apply(tensor_BTW)
        if all(isinstance(action, ConditionMeasurement) for action in self.actions):
            return
        rows = self.rows_C if self.valid is None else self.rows_C[self.valid]
        edited = cells if self.valid is None else cells[self.valid]
        Rows(target=self.target, n_tokens=self.n_tokens, rows_N=rows).put(edited, x, residual)


@dataclass(eq=False, kw_only=True)
class ConditionalPlan:
    """A step of the requests with conditions: `places` are theirs among the step's members."""

    plan: EditPlan
    places: Sequence[int]
    starts: Array
    tags: Array
    applied: dict[int, int]
    valid_steps: int | None

    def steered(self, age: int) -> RowBlock | None:
        """Where edits were made in the pass that ran, `age` steps after this was planned."""
        tags, indices, positions, made = [], [], [], []
        for cells in self.plan.gated():
            if cells.gate.last_N1 is None:
                continue
            rows, columns = cells.rows_N.cpu().numpy(), cells.columns_N.cpu().numpy()
            edits = np.array([edit.index for edit in cells.edits], dtype=np.int32)
            tags.append(self.tags[rows])
            indices.append(edits[cells.gate.owner_N.cpu().numpy()])
            positions.append((self.starts[rows] + columns + age).astype(np.int32))
            made.append(cells.gate.last_N1[:, 0].cpu().numpy())
        if not tags:
            return None
        return RowBlock(
            kind="steered",
            tags=np.concatenate(tags),
            readouts=np.concatenate(indices),
            positions=np.concatenate(positions),
            values=(np.concatenate(made),),
        )


def plan_conditional(
    requests: Sequence[ConditionalEdits],
    *,
    places: Sequence[int],
    tags: Array,
    offsets: Array,
    starts: Array,
    counts: Array,
    n_tokens: int,
    token_ids: Array | None,
    targets: Mapping[str, PointTarget],
    device: torch.device,
) -> tuple[ConditionalPlan, dict[str, PaddedActions]]:
    """Plans the rows of these requests; arrays are theirs alone. `token_ids`: of the batch, where a clause
    asks for them.
    """
    n_columns = int(counts.max())
    spans, rows = [], []
    for request, offset, start, count in zip(
        requests, offsets.tolist(), starts.tolist(), counts.tolist(), strict=True
    ):
        request.resume(start)
        fed = range(count) if token_ids is None else token_ids[offset : offset + count].tolist()
        spans.append(Span(start, fed))
        rows.append(np.minimum(np.arange(n_columns), count - 1) + offset)
    plan = plan_edits(spans, [request.edits for request in requests], n_columns=n_columns, device=device)
    owners = {
        id(edit): place for place, request in zip(places, requests, strict=True) for edit in request.edits
    }
    applied: dict[int, int] = {}
    for edit, n in plan.promised:
        applied[owners[id(edit)]] = applied.get(owners[id(edit)], 0) + n
    cells = torch.from_numpy(np.concatenate(rows)).to(device)
    valid = np.flatnonzero((np.arange(n_columns) < counts[:, None]).reshape(-1))
    padded = len(valid) < len(cells)
    actions = {
        name: PaddedActions(
            target=targets[name],
            n_tokens=n_tokens,
            rows_C=cells,
            shape=(len(requests), n_columns),
            valid=torch.from_numpy(valid).to(device) if padded else None,
            actions=todo,
            members=places,
        )
        for name, todo in plan.actions.items()
    }
    valid_steps = plan.valid_steps if n_columns == 1 else 0
    return (
        ConditionalPlan(
            plan=plan, places=places, starts=starts, tags=tags, applied=applied, valid_steps=valid_steps
        ),
        actions,
    )


def condition_steered(edit: PreparedIntervention, condition: PreparedCondition) -> None:
    """Puts an edit under a condition."""
    edit.condition = condition
    edit.steered = Steered(torch.zeros((), dtype=torch.int64))
