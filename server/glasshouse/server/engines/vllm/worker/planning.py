"""Which rows of a batch get which edits and readouts: integer arithmetic over all requests at once.

1. Every installed request is a table of segments (one range of one clause); those of the batch are stacked, and each
   is cut to the positions that its request runs in this step.
2. Edits are sorted by (hook point, turn, kind): a request's k-th edit at a point has turn k, so within a group no row
   appears twice and groups run in order. A group becomes one action.
3. Readouts are sorted by what they ask; each hook point is captured once, with the rows that any of them wants.
4. A batch of decoding rows changes only in its positions: its plan holds until a clause begins or ends (`valid_steps`).

The cost is that of a dozen NumPy calls a hook point; it does not grow with the number of different configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.interventions.features import FeatureGroup

from .actions import Action, Capture, MeasureFeatures, PlainAdd, Rows, RunAdd, VectorEdit, WriteFeatures
from .conditional import ConditionalPlan, plan_conditional
from .junctions import Junction, PointTarget
from .requests import (
    ADD,
    HIGH,
    KIND,
    LOW,
    QUESTION,
    READ_HIGH,
    READ_LOW,
    READ_SITE,
    READOUT,
    REPLACE,
    SITE,
    SLOT,
    SOURCE,
    TURN,
    FeatureEdit,
    InstalledRequest,
)
from .steering import WatchedRows
from .tables import EditTable

Array = np.ndarray

_NAMES = ("add", "project", "rotate", "replace")
# Above so many rows a vector, vectors are added run by run instead of being gathered row by row.
_LONG_RUN = 16
_NEVER = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The hook points of this worker's junctions, numbered in the order of the forward pass."""

    names: tuple[str, ...]
    targets: tuple[PointTarget, ...]
    junctions: tuple[int, ...]

    @staticmethod
    def of(junctions: Sequence[Junction]) -> Sites:
        """Numbers the points of `junctions`."""
        points = [(name, target, j.index) for j in junctions for name, target in j.points]
        return Sites(
            names=tuple(name for name, _, _ in points),
            targets=tuple(target for _, target, _ in points),
            junctions=tuple(index for _, _, index in points),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class HookedBatch:
    """The hooked requests of a step, int64 (M,) each: request m runs positions `starts`..`starts + counts` in the
    batch's rows from `offsets` on. `token_ids` gives the batch's T token ids, fetched only where a clause asks for them.
    """

    members: Sequence[InstalledRequest]
    offsets: Array
    starts: Array
    counts: Array
    n_tokens: int
    token_ids: Callable[[], Array]


@dataclass(eq=False, kw_only=True)
class Answer:
    """Readouts that ask one question: rows int32 (n,) of tags, readout indices and positions. `places`: for each of the
    question's sites, where its rows lie among those captured; None where they are all of them in order.
    """

    question: int
    members: Array
    tags: Array
    readouts: Array
    positions: Array
    places: list[Tensor | None]


@dataclass(eq=False, kw_only=True)
class StepPlan:
    """Actions by junction, and what to report after the pass. `members` as in the batch; `applied` int32 (M,)."""

    members: Sequence[InstalledRequest]
    actions: dict[int, list[Action]] = field(default_factory=dict)
    captures: dict[int, Capture] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    tags: Array
    starts: Array
    counts: Array
    applied: Array
    valid_steps: int = 0
    # Steps since it was made: positions have moved on by as many.
    age: int = 0
    conditional: ConditionalPlan | None = None
    # What monitors that steer look at after the pass.
    watched: list[WatchedRows] = field(default_factory=list)

    def remember(self) -> None:
        """Tells requests with conditions how far the passes under this plan have run them."""
        for place, member in enumerate(self.members):
            if member.conditional is not None:
                assert self.conditional is not None, "a member with conditions was planned"
                start = int(self.starts[place]) + self.age
                member.conditional.ran(start, int(self.counts[place]), self.conditional.plan)


@dataclass(eq=False)
class _Expanded:
    """Live segments and their rows: `segments` (S, columns), `of_segment` (S,) member, `rows` (N,), `owner`
    (N,) segment.
    """

    segments: Array
    of_segment: Array
    first: Array
    lengths: Array
    rows: Array
    owner: Array
    positions: Array


def plan_step(batch: HookedBatch, *, sites: Sites, edits: EditTable, vectors_VW: Tensor) -> StepPlan:
    """Plans one forward pass."""
    members = batch.members
    plan = StepPlan(
        members=members,
        tags=np.array([member.tag for member in members], dtype=np.int32),
        starts=batch.starts.astype(np.int32),
        counts=batch.counts.astype(np.int32),
        applied=np.zeros(len(members), dtype=np.int32),
    )
    by_site: dict[int, list[tuple[int, int, Action]]] = {}
    _plan_edits(plan, batch, by_site, sites, edits, vectors_VW)
    _plan_features(plan, batch, by_site, sites, vectors_VW.device)
    plan.conditional = _plan_conditional(plan, batch, by_site, sites, vectors_VW.device)
    for site, turned in by_site.items():
        turned.sort(key=lambda item: item[:2])
        by_site[site] = turned
    _plan_readouts(plan, batch, sites, vectors_VW.device)
    for site in sorted({*by_site, *plan.captures}):
        actions = plan.actions.setdefault(sites.junctions[site], [])
        actions.extend(action for _, _, action in by_site.get(site, ()))
        if site in plan.captures:
            actions.append(plan.captures[site])
    plan.valid_steps = _valid_steps(batch)
    if plan.conditional is not None and plan.conditional.valid_steps is not None:
        plan.valid_steps = min(plan.valid_steps, plan.conditional.valid_steps)
    return plan


def _stacked(batch: HookedBatch, tables: Sequence[Array]) -> tuple[Array, Array]:
    segments = tables[0] if len(tables) == 1 else np.concatenate(tables)
    of_segment = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return segments, of_segment


def _live(
    batch: HookedBatch, segments: Array, of_segment: Array, low: int, high: int
) -> tuple[Array, Array, Array, Array]:
    """Segments that cover rows of this step, their members, first rows and lengths."""
    starts, counts = batch.starts[of_segment], batch.counts[of_segment]
    first = np.maximum(segments[:, low] - starts, 0)
    stop = np.minimum(segments[:, high] - starts, counts)
    live = first < stop
    if not live.all():
        segments, of_segment, first, stop = segments[live], of_segment[live], first[live], stop[live]
    return segments, of_segment, batch.offsets[of_segment] + first, stop - first


def _expand(
    batch: HookedBatch, segments: Array, of_segment: Array, first: Array, lengths: Array
) -> _Expanded:
    n = len(segments)
    if (lengths == 1).all():
        rows, owner = first, np.arange(n)
    else:
        owner = np.repeat(np.arange(n), lengths)
        begins = np.cumsum(lengths) - lengths
        rows = first[owner] + np.arange(len(owner)) - begins[owner]
    member = of_segment[owner]
    positions = batch.starts[member] + rows - batch.offsets[member]
    return _Expanded(segments, of_segment, first, lengths, rows, owner, positions)


def _keep(expanded: _Expanded, keep: Array) -> None:
    expanded.rows, expanded.owner = expanded.rows[keep], expanded.owner[keep]
    expanded.positions = expanded.positions[keep]
    expanded.lengths = np.bincount(expanded.owner, minlength=len(expanded.segments))


def _drop_excluded(
    batch: HookedBatch,
    expanded: _Expanded,
    excluded: Callable[[InstalledRequest], Mapping[int, Array]],
    column: int,
) -> None:
    """Takes out rows whose token a clause excludes, from the end of the prompt on."""
    keep = None
    for index, (member, segment) in enumerate(zip(expanded.of_segment, expanded.segments, strict=True)):
        request = batch.members[member]
        tokens = excluded(request).get(int(segment[column]))
        if tokens is None:
            continue
        own = expanded.owner == index
        bad = np.isin(batch.token_ids()[expanded.rows], tokens) & (expanded.positions >= request.n_prompt)
        keep = ~(own & bad) if keep is None else keep & ~(own & bad)
    if keep is not None:
        _keep(expanded, keep)


def _groups(keys: Array) -> list[slice]:
    """Runs of equal keys of a sorted array."""
    edges = np.flatnonzero(np.diff(keys)) + 1
    bounds = [0, *edges.tolist(), len(keys)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def _rows(rows: Array, n_tokens: int, target: PointTarget, device: torch.device) -> Rows:
    whole = len(rows) == n_tokens and (np.diff(rows) == 1).all()
    return Rows(target=target, n_tokens=n_tokens, rows_N=None if whole else torch.from_numpy(rows).to(device))


def _plan_edits(
    plan: StepPlan,
    batch: HookedBatch,
    by_site: dict[int, list[tuple[int, int, Action]]],
    sites: Sites,
    edits: EditTable,
    vectors_VW: Tensor,
) -> None:
    segments, of_segment = _stacked(batch, [member.edit_segments for member in batch.members])
    if not len(segments):
        return
    segments, of_segment, first, lengths = _live(batch, segments, of_segment, LOW, HIGH)
    if not len(segments):
        return
    keys = (segments[:, SITE] << 24) | (segments[:, TURN] << 4) | segments[:, KIND]
    # Rows in order within a group, so that a batch edited whole is seen to be.
    order = np.lexsort((first, keys))
    segments, of_segment, first, lengths, keys = (
        segments[order], of_segment[order], first[order], lengths[order], keys[order]
    )  # fmt: skip
    some_excluded = any(member.excluded_tokens for member in batch.members)
    for part in _groups(keys):
        expanded = _expand(batch, segments[part], of_segment[part], first[part], lengths[part])
        if some_excluded:
            _drop_excluded(batch, expanded, lambda request: request.excluded_tokens, SLOT)
            if not len(expanded.rows):
                continue
        site, turn = int(segments[part][0, SITE]), int(segments[part][0, TURN])
        np.add.at(plan.applied, expanded.of_segment, expanded.lengths.astype(np.int32))
        action = _edit_action(batch, expanded, sites.targets[site], edits, vectors_VW)
        by_site.setdefault(site, []).append((turn, 1, action))


def _edit_action(
    batch: HookedBatch, expanded: _Expanded, target: PointTarget, edits: EditTable, vectors_VW: Tensor
) -> Action:
    device = vectors_VW.device
    kind = int(expanded.segments[0, KIND])
    slots = expanded.segments[:, SLOT]
    numbers = edits.numbers_E4[slots]
    keeps = edits.keep_norm_E[slots]
    members = sorted(set(expanded.of_segment.tolist()))
    n_rows, n_segments = len(expanded.rows), len(slots)
    if kind == ADD and not keeps.any() and not numbers[:, 1].any():
        vectors = vectors_VW.index_select(0, torch.from_numpy(edits.vectors_E3[slots, 0]).to(device))
        delta = vectors * torch.from_numpy(numbers[:, :1]).to(device)
        if n_rows >= _LONG_RUN * n_segments and _is_run(expanded):
            return RunAdd(
                target=target,
                starts=expanded.first.tolist(),
                stops=(expanded.first + expanded.lengths).tolist(),
                delta_RW=delta,
                members=members,
            )
        if n_rows != n_segments:
            delta = delta.index_select(0, torch.from_numpy(expanded.owner).to(device))
        return PlainAdd(
            rows=_rows(expanded.rows, batch.n_tokens, target, device), delta_NW=delta, members=members
        )
    vector_rows = edits.vectors_E3[slots][expanded.owner]
    if kind == REPLACE:
        _replacements(batch, expanded, edits, vector_rows)

    def column(values: Array) -> Tensor:
        return torch.from_numpy(values[expanded.owner, None]).to(device)

    return VectorEdit(
        kind=_NAMES[kind],
        rows=_rows(expanded.rows, batch.n_tokens, target, device),
        table_VW=vectors_VW,
        vector_rows_N3=torch.from_numpy(vector_rows).to(device),
        plain_N1=column(numbers[:, 0]),
        scaled_N1=column(numbers[:, 1]) if numbers[:, 1].any() else None,
        low_N1=column(numbers[:, 2]),
        high_N1=column(numbers[:, 3]),
        keep_norm_N1=column(keeps) if keeps.any() else None,
        members=members,
    )


def _is_run(expanded: _Expanded) -> bool:
    """Whether every segment still has all of its rows, one after the other."""
    ends = expanded.first + expanded.lengths - 1
    last = np.cumsum(expanded.lengths) - 1
    return bool((expanded.rows[last] == ends).all())


def _replacements(batch: HookedBatch, expanded: _Expanded, edits: EditTable, vector_rows: Array) -> None:
    """Fills in, for edits with a row a position, which vector each position gets: its rank among those selected."""
    for index, segment in enumerate(expanded.segments):
        table = edits.replacement[int(segment[SLOT])]
        if table is None:
            continue
        request = batch.members[expanded.of_segment[index]]
        # Of the edit as it was asked for: where a monitor steers, a part of it may be in force.
        every = request.edit_segments if request.steering is None else request.steering.segments
        own = every[every[:, SLOT] == segment[SLOT]]
        mine = expanded.owner == index
        beyond = np.maximum(expanded.positions[mine, None] - own[:, LOW], 0)
        vector_rows[mine, 0] = table[np.minimum(beyond, own[:, HIGH] - own[:, LOW]).sum(1)]


def _plan_features(
    plan: StepPlan,
    batch: HookedBatch,
    by_site: dict[int, list[tuple[int, int, Action]]],
    sites: Sites,
    device: torch.device,
) -> None:
    number = {name: index for index, name in enumerate(sites.names)}
    groups: dict[object, list[tuple[int, FeatureEdit, Array]]] = {}
    for place, member in enumerate(batch.members):
        for edit in member.feature_edits:
            rows = _feature_rows(batch, place, edit)
            if len(rows):
                plan.applied[place] += len(rows)
                groups.setdefault(edit.group, []).append((place, edit, rows))
    for entries in groups.values():
        counts = [len(rows) for _, _, rows in entries]
        rows = np.concatenate([rows for _, _, rows in entries])
        group = FeatureGroup(
            [edit.prepared for _, edit, _ in entries],
            counts,
            torch.arange(len(rows), device=device),
            torch.zeros(len(rows), dtype=torch.int64, device=device),
            torch.from_numpy(np.repeat(np.arange(len(entries)), counts)).to(device),
        )
        members = sorted({place for place, _, _ in entries})
        turns = entries[0][1].turns
        for index, path in enumerate(group.paths):
            name = group.points_in[path.source].name
            site = number[name]
            at = _rows(rows, batch.n_tokens, sites.targets[site], device)
            measure = MeasureFeatures(rows=at, group=group, path=index, members=members)
            by_site.setdefault(site, []).append((turns[name], 0, measure))
        for sink in sorted({sink for path in group.paths for sink in path.sinks}):
            name = group.points_out[sink].name
            site = number[name]
            at = _rows(rows, batch.n_tokens, sites.targets[site], device)
            write = WriteFeatures(rows=at, group=group, sink=sink, members=members)
            by_site.setdefault(site, []).append((turns[name], 2, write))


def _plan_conditional(
    plan: StepPlan,
    batch: HookedBatch,
    by_site: dict[int, list[tuple[int, int, Action]]],
    sites: Sites,
    device: torch.device,
) -> ConditionalPlan | None:
    places = [place for place, member in enumerate(batch.members) if member.conditional is not None]
    if not places:
        return None
    requests = [member.conditional for member in batch.members if member.conditional is not None]
    by_token = any(batch.members[place].by_token for place in places)
    planned, actions = plan_conditional(
        requests,
        places=places,
        tags=plan.tags[places],
        offsets=batch.offsets[places],
        starts=batch.starts[places],
        counts=batch.counts[places],
        n_tokens=batch.n_tokens,
        token_ids=batch.token_ids() if by_token else None,
        targets=dict(zip(sites.names, sites.targets, strict=True)),
        device=device,
    )
    number = {name: index for index, name in enumerate(sites.names)}
    for name, action in actions.items():
        by_site.setdefault(number[name], []).append((0, 0, action))
    for place, n in planned.applied.items():
        plan.applied[place] += n
    return planned


def _feature_rows(batch: HookedBatch, place: int, edit: FeatureEdit) -> Array:
    start, count, offset = int(batch.starts[place]), int(batch.counts[place]), int(batch.offsets[place])
    parts = [
        np.arange(max(low, start), min(high, start + count))
        for low, high in edit.clause.ranges
        if low < start + count and high > start
    ]
    if not parts:
        return np.empty(0, dtype=np.int64)
    positions = np.concatenate(parts)
    rows: Array = positions - start + offset
    if edit.clause.excluded_token_ids:
        bad = np.isin(batch.token_ids()[rows], edit.clause.excluded_token_ids)
        rows = rows[~(bad & (positions >= edit.clause.n_prompt))]
    return rows


def _plan_readouts(plan: StepPlan, batch: HookedBatch, sites: Sites, device: torch.device) -> None:
    segments, of_segment = _stacked(batch, [member.read_segments for member in batch.members])
    if not len(segments):
        return
    segments, of_segment, first, lengths = _live(batch, segments, of_segment, READ_LOW, READ_HIGH)
    if not len(segments):
        return
    keys = (segments[:, QUESTION] << 16) | segments[:, SOURCE]
    order = np.lexsort((first, segments[:, READOUT], keys))
    segments, of_segment, first, lengths, keys = (
        segments[order], of_segment[order], first[order], lengths[order], keys[order]
    )  # fmt: skip
    some_excluded = any(member.read_excluded_tokens for member in batch.members)
    wanted: dict[int, list[Array]] = {}
    answers: dict[int, tuple[Answer, list[tuple[int, Array]]]] = {}
    for part in _groups(keys):
        expanded = _expand(batch, segments[part], of_segment[part], first[part], lengths[part])
        if some_excluded:
            _drop_excluded(batch, expanded, lambda request: request.read_excluded_tokens, READOUT)
        if not len(expanded.rows):
            continue
        question, site = int(segments[part][0, QUESTION]), int(segments[part][0, READ_SITE])
        wanted.setdefault(site, []).append(expanded.rows)
        if question not in answers:
            member = expanded.of_segment[expanded.owner]
            answer = Answer(
                question=question,
                members=np.unique(member),
                tags=plan.tags[member],
                readouts=expanded.segments[expanded.owner, READOUT].astype(np.int32),
                positions=expanded.positions.astype(np.int32),
                places=[],
            )
            answers[question] = (answer, [])
        answers[question][1].append((site, expanded.rows))
    watching = {m.scores_question for m in batch.members if m.steering is not None}
    captured: dict[int, Array] = {}
    for site, rows in wanted.items():
        unique = np.unique(np.concatenate(rows)) if len(rows) > 1 else np.unique(rows[0])
        captured[site] = unique
        members = sorted(
            {int(m) for answer, at in answers.values() if site in dict(at) for m in answer.members}
        )
        plan.captures[site] = Capture(
            rows=_rows(unique, batch.n_tokens, sites.targets[site], device), members=members
        )
    for answer, at in answers.values():
        for site, own in at:
            unique = captured[site]
            whole = len(own) == len(unique) and bool((own == unique).all())
            place = None if whole else torch.from_numpy(np.searchsorted(unique, own)).to(device)
            answer.places.append(place)
        if answer.question in watching:
            plan.watched.append(WatchedRows.of(answer, at, batch.members))
        else:
            plan.answers.append(answer)


def _valid_steps(batch: HookedBatch) -> int:
    """Further steps for which the plan holds if every request goes on by one token a step."""
    if (batch.counts != 1).any() or any(member.volatile for member in batch.members):
        return 0
    nearest = _NEVER
    for low, high, tables in (
        (LOW, HIGH, [member.edit_segments for member in batch.members]),
        (READ_LOW, READ_HIGH, [member.read_segments for member in batch.members]),
    ):
        segments, of_segment = _stacked(batch, tables)
        if not len(segments):
            continue
        at = batch.starts[of_segment]
        begins, ends = segments[:, low], segments[:, high]
        change = np.where(begins > at, begins, np.where(ends > at, ends, at + _NEVER)) - at
        nearest = min(nearest, int(change.min()))
    for place, member in enumerate(batch.members):
        at_place = int(batch.starts[place])
        for edit in member.feature_edits:
            for bounds in edit.clause.ranges:
                nearest = min([nearest, *(edge - at_place for edge in bounds if edge > at_place)])
    return nearest - 1
