"""Which rows of a forward pass get which edits: planned once, applied at each site by a few batched operations.

1. Each row of the batch contributes the positions it feeds that its request's edits select.
2. At one hook point a request's edits must run in order, so its k-th edit there goes to round k. Rows of different
   requests never meet: a round holds at most one edit a row and position.
3. A round is split by primitive; each group gathers its rows, runs one kernel and writes them back in place.
4. An edit's condition is measured in the round that the edit has, or would have, at the condition's hook points, before
   that round's edits; the edits under one group of conditions make a group, which writes where they hold.

A plan for decoding rows (one token each) depends on positions only through range membership: it stays valid for
`valid_steps` further steps, so a steady batch pays for planning once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from glasshouse.server.types.spans import Span

from . import kernels
from .conditions import ConditionCells, ConditionGroup, ConditionMeasurement, Gate, Steered
from .edits import GatedCells, PreparedEdit, PreparedIntervention, Primitive
from .features import FeatureGroup, FeatureMeasurement, FeatureWriting, PreparedFeatureEdit

P = TypeVar("P", bound=PreparedIntervention)

# What conditions must share to be measured together: their kind, and their turn at each of their points.
_Measured = tuple[tuple[object, ...], tuple[int, ...]]


@dataclass(eq=False, kw_only=True)
class EditGroup:
    """Edits of one primitive in one round at one hook point; N cells (row of the batch, index within the row)."""

    primitive: Primitive
    rows_N: Tensor
    columns_N: Tensor
    vectors_VNW: Tensor  # (1, N, W), or (3, N, W) for ROTATE
    plain_N1: Tensor
    scaled_N1: Tensor | None
    low_N1: Tensor
    high_N1: Tensor
    keep_norm_N1: Tensor | None
    counts: list[tuple[PreparedEdit, int]]
    # All rows of a one-column batch in order: the cells are the tensor itself, no gather needed.
    whole: bool
    gate: Gate | None = None

    def cells(self) -> list[tuple[int, int]]:
        """The (row, column) cells it edits."""
        return list(zip(self.rows_N.tolist(), self.columns_N.tolist(), strict=True))

    def remapped(self, places: Mapping[tuple[int, int], int]) -> EditGroup:
        """The same edits on a tensor (n, 1, W) whose row `places[cell]` is that cell."""
        rows = torch.tensor([places[cell] for cell in self.cells()], device=self.rows_N.device)
        return replace(self, rows_N=rows, columns_N=torch.zeros_like(rows), whole=False)

    def apply(self, tensor_BTW: Tensor) -> None:
        """Edits the cells of `tensor_BTW` in place."""
        cells = tensor_BTW[:, 0] if self.whole else tensor_BTW[self.rows_N, self.columns_N]
        s_NW = cells.float()
        match self.primitive:
            case Primitive.ADD:
                edited = kernels.add(s_NW, self.vectors_VNW[0], self.plain_N1, self.scaled_N1)
            case Primitive.PROJECT:
                edited = kernels.clamp_projection(s_NW, self.vectors_VNW[0], self.low_N1, self.high_N1)
            case Primitive.ROTATE:
                first, second, target = self.vectors_VNW
                edited = kernels.rotate(s_NW, first, second, target)
            case Primitive.REPLACE:
                edited = self.vectors_VNW[0]
        if self.keep_norm_N1 is not None:
            edited = kernels.restore_norm(edited, s_NW, self.keep_norm_N1)
        if self.gate is not None:
            open_N1 = self.gate.open()
            edited = torch.where(open_N1, edited, s_NW)
            self.gate.count(open_N1)
        if self.whole:
            tensor_BTW[:, 0].copy_(edited)
        else:
            tensor_BTW[self.rows_N, self.columns_N] = edited.to(tensor_BTW.dtype)
        for edit, count in self.counts:
            edit.applied += count


class SiteAction(Protocol):
    """Something done to the live activation at a hook point."""

    def apply(self, tensor_BTW: Tensor) -> None:
        """Reads or edits in place."""


_Turned = dict[str, list[tuple[int, SiteAction]]]


@dataclass(eq=False, kw_only=True)
class EditPlan:
    """Actions by hook point name, in the order they run; `valid_steps` None: until the batch changes."""

    actions: dict[str, list[SiteAction]] = field(default_factory=dict)
    promised: list[tuple[PreparedIntervention, int]] = field(default_factory=list)
    valid_steps: int | None = None

    def gated(self) -> Iterator[GatedCells]:
        """What conditions let through in the pass that ran last, a group of edits each."""
        for actions in self.actions.values():
            for action in actions:
                if isinstance(action, EditGroup) and action.gate is not None:
                    edits = [edit for edit, _ in action.counts]
                    yield GatedCells(edits, action.gate, action.rows_N, action.columns_N)
                elif isinstance(action, FeatureWriting) and action.counts and action.group.gated is not None:
                    yield action.group.gated

    def promise(self) -> None:
        """Books the positions this pass owes each edit, to be compared with what was applied."""
        for edit, count in self.promised:
            edit.promised += count


@dataclass(eq=False)
class _Cells(Generic[P]):
    edits: list[P] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, edit: P, row: int, start: int, positions: Sequence[int]) -> None:
        self.owner.extend([len(self.edits)] * len(positions))
        self.edits.append(edit)
        self.rows.extend([row] * len(positions))
        self.columns.extend([p - start for p in positions])
        self.positions.extend(positions)

    def counts(self) -> list[int]:
        counts = [0] * len(self.edits)
        for own in self.owner:
            counts[own] += 1
        return counts


def plan_edits(
    spans: Sequence[Span],
    edits: Sequence[Sequence[PreparedIntervention]],
    *,
    n_columns: int,
    device: torch.device,
) -> EditPlan:
    """Plans a pass whose row b feeds `spans[b]` under `edits[b]`; `n_columns` is the width of the padded batch."""
    plan = EditPlan()
    plain: dict[tuple[str, int, Primitive, _Measured | None], _Cells[PreparedEdit]] = {}
    # By dictionary, the turn at each of its points, and the group of conditions they are under.
    through: dict[tuple[int, tuple[int, ...], _Measured | None], _Cells[PreparedFeatureEdit]] = {}
    measured: dict[_Measured, ConditionCells] = {}
    horizon: int | None = None
    for row, (span, row_edits) in enumerate(zip(spans, edits, strict=True)):
        turns: dict[str, int] = {}
        for edit in row_edits:
            if n_columns == 1:
                horizon = _earlier(horizon, _steps_until_change(edit, span))
            condition = edit.condition
            under: _Measured | None = None
            if condition is not None:
                # Measured before what this edit and those after it write there; no turn of its own.
                under = (condition.kind, tuple(turns.get(point.name, 0) for point in condition.points))
                looked_at = condition.positions.within(span.start, span.token_ids)
                measured.setdefault(under, ConditionCells()).add(condition, row, span.start, looked_at)
            positions = edit.positions.within(span.start, span.token_ids)
            names = touched(edit)
            at = tuple(turns.get(name, 0) for name in names)
            for name in names:
                turns[name] = turns.get(name, 0) + 1
            if not positions:
                continue
            plan.promised.append((edit, len(positions)))
            if isinstance(edit, PreparedFeatureEdit):
                through.setdefault((id(edit.dictionary), at, under), _Cells()).add(
                    edit, row, span.start, positions
                )
            elif isinstance(edit, PreparedEdit):
                key = (names[0], at[0], edit.primitive, under)
                plain.setdefault(key, _Cells()).add(edit, row, span.start, positions)
            else:
                raise AssertionError(f"{type(edit).__name__} has no plan")
    turned: _Turned = {}
    groups = {key: ConditionGroup(cells, n_columns, device) for key, cells in measured.items()}
    # Sorting is stable: of one turn, what was put first runs first, and conditions are measured before anything is written.
    for (_, point_turns), conditions in groups.items():
        if conditions.looks:
            for source, (point, turn) in enumerate(zip(conditions.points, point_turns, strict=True)):
                turned.setdefault(point.name, []).append((turn, ConditionMeasurement(conditions, source)))
    for (name, turn, primitive, under), edit_cells in plain.items():
        whole = n_columns == 1 and len(edit_cells.rows) == len(spans)
        group = _group(primitive, edit_cells, whole, device)
        group.gate = None if under is None else _gate(groups[under], edit_cells, device)
        turned.setdefault(name, []).append((turn, group))
    for (_, point_turns, under), feature_cells in through.items():
        gate = None if under is None else _gate(groups[under], feature_cells, device)
        _add_features(turned, feature_cells, point_turns, gate, device)
    for name, actions in turned.items():
        plan.actions[name] = [action for _, action in sorted(actions, key=lambda item: item[0])]
    plan.valid_steps = horizon
    return plan


def touched(edit: PreparedIntervention) -> list[str]:
    """Names of the points an edit takes a turn at, each once: an edit of features reads some and writes some."""
    points = (
        (*edit.points_in, *edit.points_out) if isinstance(edit, PreparedFeatureEdit) else edit.hook_points
    )
    return list(dict.fromkeys(point.name for point in points))


def _gate(conditions: ConditionGroup, cells: _Cells[P], device: torch.device) -> Gate:
    members: list[int] = []
    steered: list[Steered] = []
    for edit in cells.edits:
        assert edit.condition is not None and edit.steered is not None, "an edit in the wrong group"
        members.append(conditions.place(edit.condition))
        steered.append(edit.steered)
    return Gate(
        conditions,
        [members[own] for own in cells.owner],
        torch.tensor(cells.columns, device=device),
        torch.tensor(cells.owner, device=device),
        steered,
    )


def _add_features(
    turned: _Turned,
    cells: _Cells[PreparedFeatureEdit],
    point_turns: tuple[int, ...],
    gate: Gate | None,
    device: torch.device,
) -> None:
    group = FeatureGroup(
        cells.edits,
        cells.counts(),
        torch.tensor(cells.rows, device=device),
        torch.tensor(cells.columns, device=device),
        torch.tensor(cells.owner, device=device),
        gate,
    )
    turn_at = dict(zip(touched(cells.edits[0]), point_turns, strict=True))
    # Where a point is read and written in the same turn, the reading comes first: sorting is stable.
    for index, path in enumerate(group.paths):
        name = group.points_in[path.source].name
        turned.setdefault(name, []).append((turn_at[name], FeatureMeasurement(group, index)))
    for sink in sorted({sink for path in group.paths for sink in path.sinks}):
        name = group.points_out[sink].name
        turned.setdefault(name, []).append((turn_at[name], FeatureWriting(group, sink)))


def _steps_until_change(edit: PreparedIntervention, span: Span) -> int | None:
    """Further steps a decoding row's plan holds: 0 means plan anew for the next one."""
    if isinstance(edit, PreparedEdit) and edit.row_of:
        return 0
    steps: int | None = None
    for positions in (edit.positions, *(() if edit.condition is None else (edit.condition.positions,))):
        if positions.excluded_token_ids:
            return 0
        change = positions.next_change(span.start)
        if change is not None:
            steps = _earlier(steps, change - span.start - 1)
    return steps


def _earlier(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def _group(primitive: Primitive, cells: _Cells[PreparedEdit], whole: bool, device: torch.device) -> EditGroup:
    edits = cells.edits
    owner = torch.tensor(cells.owner, device=device)
    if primitive is Primitive.REPLACE:
        offsets, total = [], 0
        for edit in edits:
            offsets.append(total)
            total += edit.vectors.shape[0]
        table = torch.cat([edit.vectors for edit in edits])
        index = [
            offsets[own] + edits[own].row_of.get(position, 0)
            for own, position in zip(cells.owner, cells.positions, strict=True)
        ]
        vectors = table[torch.tensor(index, device=device)][None]
    else:
        vectors = torch.stack([edit.vectors for edit in edits], dim=1)
        if len(cells.owner) != len(edits):
            vectors = vectors[:, owner]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[owner, None]

    keeps = [edit.preserve_norm for edit in edits]
    keep = torch.tensor(keeps, device=device)[owner, None] if any(keeps) else None
    return EditGroup(
        primitive=primitive,
        rows_N=torch.tensor(cells.rows, device=device),
        columns_N=torch.tensor(cells.columns, device=device),
        vectors_VNW=vectors,
        plain_N1=column([edit.scalars.plain for edit in edits]),
        scaled_N1=column([edit.scalars.scaled for edit in edits])
        if any(edit.scalars.scaled for edit in edits)
        else None,
        low_N1=column([edit.scalars.low for edit in edits]),
        high_N1=column([edit.scalars.high for edit in edits]),
        keep_norm_N1=keep,
        counts=list(zip(edits, cells.counts(), strict=True)),
        whole=whole,
    )
