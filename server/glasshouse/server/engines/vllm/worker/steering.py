"""Monitors that steer, decided in the worker: after the pass that read a score, before the next one is planned.

1. Requests under the same watches share a `Roster`, so that a decoding step scores and steps the rules of all of them at
   once, by the code that every engine runs (`engines.watching`).
2. The edits of a watch are installed with the request's own, after them, and are cut to the ranges of positions at which
   the watch has them in force: none at first. Dormant edits cost a step nothing, those in force what any edit does.
3. A position is scored when it first runs. Run again, after preemption, it is edited as it was then, for the ranges stay.
   Nothing has to be taken back, whatever a probe pools or a rule remembers.

What cannot be so is an error of the requests concerned: a position that was never seen, or several new ones beyond the
prompt in one pass (drafts), the later of which would have had to wait for the scores of the earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.engines.vllm.contract import Clause, RequestPlan, RowBlock, WatchPlan
from glasshouse.server.engines.vllm.contract.watches import within
from glasshouse.server.engines.watching import RequestWatch, Roster, Watch, WatchedPass
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.readouts.score_columns import ColumnSource, FeatureColumnSource, ProbeColumnSource
from glasshouse.server.types.conditions import MonitorAction, ProbeOutput
from glasshouse.server.types.spans import Span

from .conditional import point, positions_of
from .loaded import loaded

if TYPE_CHECKING:
    from .planning import Answer
    from .requests import FeatureEdit, InstalledRequest

Array = np.ndarray
# Columns of an edit segment; see `requests`.
_LOW, _HIGH = 4, 5


class Rosters:
    """The rosters of running requests, by the watches in them."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[tuple[WatchPlan, ...], Roster] = WeakValueDictionary()

    def of(
        self,
        watches: tuple[WatchPlan, ...],
        *,
        width: int,
        dictionaries: Mapping[str, Dictionary],
        probes: Mapping[str, ServedProbe],
    ) -> Roster:
        """The roster of these watches; one that has failed is made anew."""
        roster = self._held.get(watches)
        if roster is None or roster.broken:
            made = [_watch(index, plan, width, dictionaries, probes) for index, plan in enumerate(watches)]
            # What was sighted is for the gateway to say.
            roster = self._held[watches] = Roster(made, lambda sightings: None)
        return roster


def _watch(
    index: int,
    plan: WatchPlan,
    width: int,
    dictionaries: Mapping[str, Dictionary],
    probes: Mapping[str, ServedProbe],
) -> Watch:
    points = tuple(point(name, width) for name in plan.sites)
    source: ColumnSource
    if plan.kind == "feature":
        source = FeatureColumnSource(
            points=points, dictionary=loaded(dictionaries, plan.dictionary), feature=plan.feature
        )
    else:
        source = ProbeColumnSource(
            points=points,
            probe=loaded(probes, plan.probe),
            column=plan.column,
            output=ProbeOutput.MARGIN if plan.margin else ProbeOutput.SCORE,
        )
    return Watch(
        name=str(index),
        source=source,
        rule=plan.rule,
        on_prompt=plan.on_prompt,
        on_generated=plan.on_generated,
        skip_token_ids=frozenset(plan.skip_token_ids),
        action=MonitorAction.STEER,
        steer_while_on=plan.while_on,
    )


@dataclass(eq=False, kw_only=True)
class SteeredRequest:
    """What may steer one request, and everything that is installed of its edits, in force or not.

    `frontier`: the first position that has not been scored. `segments` (S, 6): of all its edits, uncut; `watch_S`: whose
    each is, -1 the request's own; the same of `features` and, where the request has conditions, of `conditional`.
    """

    watch: RequestWatch
    n_prompt: int
    frontier: int
    segments: Array = field(default_factory=lambda: np.empty((0, 6), np.int64))
    watch_S: Array = field(default_factory=lambda: np.empty(0, np.int64))
    features: list[tuple[int, FeatureEdit]] = field(default_factory=list)
    conditional: list[tuple[int, Clause, PreparedIntervention]] = field(default_factory=list)
    # Of the watch's turns, those that the edits in force follow.
    n_turns: int = 0

    @property
    def roster(self) -> Roster:
        """The roster it is watched under."""
        return self.watch.roster

    @property
    def begun(self) -> bool:
        """Whether it has ever been steered."""
        return bool(self.watch.steered)

    def put_in_force(self, request: InstalledRequest) -> None:
        """Cuts the request's edits to where they are in force now."""
        self.n_turns = self.watch.n_turns
        in_force = self.watch.ranges
        request.edit_segments = _cut(self.segments, self.watch_S, in_force)
        request.feature_edits = []
        for watch, edit in self.features:
            clause = edit.clause if watch < 0 else within(edit.clause, in_force.get(watch, ()))
            if clause.ranges:
                request.feature_edits.append(replace(edit, clause=clause))
        if request.conditional is not None:
            request.conditional.edits = [
                edit
                if watch < 0
                else replace(edit, positions=positions_of(within(clause, in_force.get(watch, ()))))
                for watch, clause, edit in self.conditional
            ]


def _cut(segments: Array, watch_S: Array, in_force: Mapping[int, Sequence[tuple[int, int]]]) -> Array:
    parts = [segments[watch_S < 0]]
    for watch, ranges in in_force.items():
        for low, high in ranges:
            cut = segments[watch_S == watch].copy()
            cut[:, _LOW], cut[:, _HIGH] = np.maximum(cut[:, _LOW], low), np.minimum(cut[:, _HIGH], high)
            parts.append(cut[cut[:, _LOW] < cut[:, _HIGH]])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def steered_request(plan: RequestPlan, roster: Roster) -> SteeredRequest:
    """The watches of a request that begins."""
    watch = RequestWatch(roster, np.ones(len(roster), dtype=bool), tell_text=False)
    # Whose edits these are is known by their ranges.
    watch.steers = dict.fromkeys(range(len(roster)), ())
    watch.begin(range(plan.n_prompt))
    (readout,) = [readout for readout in plan.readouts if readout.kind == "scores"]
    # No position counts where nothing beyond the prompt is fed.
    frontier = min((low for low, _ in readout.clause.ranges), default=plan.n_prompt)
    return SteeredRequest(watch=watch, n_prompt=plan.n_prompt, frontier=frontier)


@dataclass(eq=False)
class Concluded:
    """What a pass came to: scores to send, requests that failed, with why, and whether edits in force have changed."""

    blocks: list[RowBlock] = field(default_factory=list)
    failed: list[tuple[InstalledRequest, str]] = field(default_factory=list)
    changed: bool = False


@dataclass(eq=False, kw_only=True)
class WatchedRows:
    """The rows of a pass that one roster looks at: those of `requests` follow one another, cut at `edges`. `rows`: in the
    batch; `sites`: where what is scored was captured, by number, in the order of the roster's points.
    """

    answer: Answer
    requests: Sequence[InstalledRequest]
    steered: Sequence[SteeredRequest]
    edges: Array
    rows: Array
    sites: Sequence[int]
    _decoding: WatchedPass | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, answer: Answer, at: Sequence[tuple[int, Array]], members: Sequence[InstalledRequest]
    ) -> WatchedRows:
        """Of an answer and the rows that it takes at each site."""
        edges = np.concatenate([[0], np.flatnonzero(np.diff(answer.tags)) + 1, [len(answer.tags)]])
        by_tag = {member.tag: member for member in members}
        requests = [by_tag[tag] for tag in answer.tags[edges[:-1]].tolist()]
        return cls(
            answer=answer,
            requests=requests,
            steered=[request.steering for request in requests if request.steering is not None],
            edges=edges,
            rows=at[0][1],
            sites=[site for site, _ in at],
        )

    @torch.inference_mode()
    def conclude(self, captured: Mapping[int, Tensor], token_ids: Callable[[], Array], age: int) -> Concluded:
        """Scores the rows and steps the rules. `age`: steps since it was planned.

        Raises:
            ValueError: they could not be scored.
        """
        found = Concluded()
        parts = [
            captured[site] if place is None else captured[site].index_select(0, place)
            for site, place in zip(self.sites, self.answer.places, strict=True)
        ]
        positions = self.answer.positions + np.int32(age)
        tokens = token_ids()[self.rows]
        starts, counts = positions[self.edges[:-1]].tolist(), np.diff(self.edges).tolist()
        decoding = [
            place
            for place, (start, count, one) in enumerate(zip(starts, counts, self.steered, strict=True))
            if count == 1 and start == one.frontier >= one.n_prompt
        ]
        crossed = True
        if len(decoding) == len(starts):
            if self._decoding is None:
                self._decoding = WatchedPass([one.watch for one in self.steered], one_token=True)
            scores, crossed = self._step(self._decoding, self.steered, parts, positions, tokens)
            found.blocks.append(self._block(slice(None), positions, scores))
        else:
            if decoding:
                rows = self.edges[decoding]
                steered = [self.steered[place] for place in decoding]
                step = WatchedPass([one.watch for one in steered], one_token=True)
                some = [part[rows] for part in parts]
                scores, _ = self._step(step, steered, some, positions[rows], tokens[rows])
                found.blocks.append(self._block(rows, positions[rows], scores))
            for place in sorted(set(range(len(starts))).difference(decoding)):
                try:
                    new = self._run(place, parts, positions, tokens)
                except ValueError as error:
                    found.failed.append((self.requests[place], str(error)))
                    continue
                if new is not None:
                    found.blocks.append(self._block(new[0], positions[new[0]], new[1]))
        if self.steered[0].roster.broken:
            raise ValueError("a monitor that steers could not be scored")
        if crossed:
            for request, one in zip(self.requests, self.steered, strict=True):
                if one.n_turns != one.watch.n_turns:
                    one.put_in_force(request)
                    found.changed = True
        return found

    def _step(
        self,
        step: WatchedPass,
        steered: Sequence[SteeredRequest],
        parts: Sequence[Tensor],
        positions: Array,
        tokens: Array,
    ) -> tuple[Array, bool]:
        """One new position of each request, beyond its prompt; the scores, and whether any threshold was passed."""
        fed = positions.tolist()
        scores = _scored(steered[0].roster, step, [part[:, None] for part in parts])
        crossed = step.conclude_step(fed, tokens.tolist())
        for one, position in zip(steered, fed, strict=True):
            one.frontier = position + 1
        return scores(), crossed

    def _run(
        self, place: int, parts: Sequence[Tensor], positions: Array, tokens: Array
    ) -> tuple[slice, Array] | None:
        """A piece of a request's prompt, or what it runs again; the rows that are new and their scores, None of none.

        Raises:
            ValueError: what can be seen now is too little, or too late, to steer by.
        """
        one, low, high = self.steered[place], int(self.edges[place]), int(self.edges[place + 1])
        start, stop = int(positions[low]), int(positions[high - 1]) + 1
        if stop <= one.frontier:
            return None
        if start > one.frontier:
            raise ValueError(f"position {one.frontier} has not been seen, position {start} runs")
        new = slice(low + one.frontier - start, high)
        in_prompt = stop <= one.n_prompt
        if not in_prompt and (one.frontier < one.n_prompt or stop > one.frontier + 1):
            raise ValueError(
                f"positions {one.frontier} to {stop - 1} run at once, each before the last was scored"
            )
        watched = WatchedPass([one.watch], one_token=not in_prompt)
        scores = _scored(one.roster, watched, [part[new][None] for part in parts])
        fed = tokens[new].tolist()
        if in_prompt:
            watched.conclude_prompts([Span(one.frontier, fed)])
        else:
            watched.conclude_step([one.frontier], fed)
        one.frontier = stop
        return new, scores()

    def _block(self, rows: Array | slice, positions: Array, scores: Array) -> RowBlock:
        return RowBlock(
            kind="scores",
            tags=self.answer.tags[rows],
            readouts=self.answer.readouts[rows],
            positions=positions,
            values=(scores.astype(np.float64, copy=False),),
        )


def _scored(roster: Roster, watched: WatchedPass, parts: Sequence[Tensor]) -> Callable[[], Array]:
    """Feeds a pass the activations (B, T, W) at the roster's points; what it will have scored, a row a position."""
    roster.log.drain()
    watched.begin()
    for name, part in zip(roster.columns.points, parts, strict=True):
        watched.at(name, part, may_change=False)
    return lambda: np.concatenate(
        [scores for scores, _ in roster.log.drain()] or [np.empty((0, len(roster)))]
    )
