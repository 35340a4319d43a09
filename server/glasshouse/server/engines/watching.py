"""Watches on requests: scores of live activations, thresholds on them, and what follows within the same step.

1. A `Roster` is a fixed list of watches (a monitor each), with what scores them. Whoever changes the list makes a new
   roster; requests keep the one that they began with.
2. A request comes with a `RequestWatch`: which watches of the roster look at it.
3. After each pass the engine calls `conclude_...`: all scores of all requests of a roster take one step of its rules. What
   crossed a threshold is flagged, steered or aborted at once, and reported.
4. Scores are logged, a step an array, for whoever counts them.

Lives in the engine's thread, but for `Roster.report` and `ScoreLog.drain`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.probes.aggregation import Rule
from glasshouse.server.probes.pooling import RunningPool
from glasshouse.server.probes.rule_bank import Crossing, Floats, Masks, RuleBank, Slots
from glasshouse.server.readouts.score_columns import ColumnSource, ScoreColumns, ScorePass
from glasshouse.server.types.conditions import Abort, MonitorAction, MonitorFlag
from glasshouse.server.types.errors import ServingError
from glasshouse.server.types.interventions import Intervention
from glasshouse.server.types.spans import Span

# Flags that one response carries at most; events go on being counted and reported.
MAX_FLAGS = 64
# Scores that wait to be counted.
MAX_LOGGED = 1 << 20
# Crossings of one watch that one request reports at most.
MAX_SIGHTINGS = 32
# A position beyond any context.
FOREVER = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch:
    """One watch. `name`: the monitor's resource name with its version. `interventions`: of STEER, checked already."""

    name: str
    source: ColumnSource
    rule: Rule
    on_prompt: bool = True
    on_generated: bool = True
    skip_token_ids: frozenset[int] = frozenset()
    action: MonitorAction = MonitorAction.OBSERVE
    interventions: tuple[Intervention, ...] = ()
    steer_while_on: bool = False
    wants_text: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Sighting:
    """A threshold was crossed. `position`: of the token fed in; `token_ids`: up to and with it, where a text is wanted."""

    watch: Watch
    request: RequestWatch
    raised: bool
    position: int
    score: float
    aggregate: float
    token_ids: tuple[int, ...] = ()


class ScoreLog:
    """Scores as they are made: arrays (rows, M) with masks of those that count. Bounded; says how many it dropped."""

    def __init__(self, max_scores: int) -> None:
        self._max_scores = max_scores
        self._parts: deque[tuple[Floats, Masks]] = deque()
        self._held = 0
        self.n_dropped = 0

    def add(self, scores: Floats, use: Masks) -> None:
        """From the engine's thread. The arrays are not copied."""
        if self._held + scores.size > self._max_scores:
            self.n_dropped += int(use.sum())
            return
        self._held += scores.size
        self._parts.append((scores, use))

    def drain(self) -> list[tuple[Floats, Masks]]:
        """What came since the last time, oldest first. From one thread."""
        taken = []
        while self._parts:
            taken.append(self._parts.popleft())
        # A part that comes in between is counted as gone: the bound is a bound on memory, not an account.
        self._held = 0
        return taken


class Roster:
    """A fixed list of watches. `report` takes sightings, from the engine's thread: it must not block. `on_failure` is told
    of a watch that can no longer do what it is for, on the event loop; `on_break` of a defect, in the engine's thread.
    """

    def __init__(
        self,
        watches: Sequence[Watch],
        report: Callable[[Sequence[Sighting]], None],
        *,
        on_failure: Callable[[Watch, ServingError], None] = lambda watch, error: None,
        on_break: Callable[[Roster, Exception], None] = lambda roster, error: None,
        max_logged: int = MAX_LOGGED,
    ) -> None:
        self.watches = tuple(watches)
        self.report = report
        self.on_failure = on_failure
        self._on_break = on_break
        self.broken = False
        self.columns = ScoreColumns([watch.source for watch in watches])
        self.rules = RuleBank([watch.rule for watch in watches])
        self.log = ScoreLog(max_logged)
        # Those that are watched under it, queued ones included.
        self.requests: weakref.WeakSet[RequestWatch] = weakref.WeakSet()
        self.on_prompt_M = np.array([watch.on_prompt for watch in watches], dtype=bool)
        self.on_generated_M = np.array([watch.on_generated for watch in watches], dtype=bool)
        self.skip_token_ids = frozenset[int]().union(*(watch.skip_token_ids for watch in watches))
        self.skips_M = np.array([bool(watch.skip_token_ids) for watch in watches], dtype=bool)

    def __len__(self) -> int:
        return len(self.watches)

    def breaks(self, error: Exception) -> None:
        """Something in it failed: from now on it looks at nothing. The requests that it watches go on."""
        self.broken = True
        self._on_break(self, error)


class RequestWatch:
    """What watches one request. `watched_M`: which of the roster's watches do. `origin`: whatever whoever attached it
    wants to know again with a sighting. `tell_text`: whether its tokens may be in sightings, where a watch wants them.
    """

    def __init__(
        self, roster: Roster, watched_M: Masks, *, origin: Any = None, tell_text: bool = True
    ) -> None:
        assert watched_M.shape == (len(roster),), "one entry a watch"
        self.roster = roster
        self.watched_M = watched_M
        self.origin = origin
        self.flags: list[MonitorFlag] = []
        self.pools: dict[int, RunningPool] = {}
        # The edits of each steering watch, made ready for this request; `steering` are those in force.
        self.steers: dict[int, tuple[PreparedIntervention, ...]] = {}
        self.steering: dict[int, tuple[PreparedIntervention, ...]] = {}
        self.steered: set[int] = set()
        # The positions at which each has been in force, ascending half-open ranges; `n_turns` counts their changes.
        self.ranges: dict[int, list[tuple[int, int]]] = {}
        self.n_turns = 0
        self.abort: Abort | None = None
        # The tokens fed, kept where an event's text may be asked for.
        self.prompt: Sequence[int] = ()
        self.generated: list[int] = []
        self.wants_text = tell_text and any(
            watch.wants_text for watch, on in zip(roster.watches, watched_M, strict=True) if on
        )
        self.slot = -1
        roster.requests.add(self)
        self._n_sightings = [0] * len(roster)

    def begin(self, prompt: Sequence[int]) -> None:
        """Its first pass comes. In the engine's thread: before, it may be made anywhere."""
        if self.slot < 0:
            self.prompt = prompt
            self.slot = self.roster.rules.take()
            # A request may end in a dozen ways; its slot is given back in all of them.
            weakref.finalize(self, self.roster.rules.free, self.slot)

    @property
    def needs_edits(self) -> Sequence[int]:
        """The watches that may steer it."""
        return [
            index
            for index, watch in enumerate(self.roster.watches)
            if self.watched_M[index] and watch.action is MonitorAction.STEER
        ]

    @property
    def edits(self) -> tuple[PreparedIntervention, ...]:
        """The edits in force now, in the order of the watches."""
        return tuple(edit for index in sorted(self.steering) for edit in self.steering[index])

    @property
    def all_edits(self) -> tuple[PreparedIntervention, ...]:
        """Every edit that was ever in force."""
        return tuple(edit for index in sorted(self.steered) for edit in self.steers[index])

    def take(self, crossing: Crossing, position: int) -> Sighting | None:
        """Does what the watch does; returns what to report, None beyond the bound."""
        index, watch = crossing.rule, self.roster.watches[crossing.rule]
        if crossing.raised:
            self._react(index, watch, crossing, position)
        elif watch.steer_while_on and self.steering.pop(index, None) is not None:
            self._release(index, position)
        self._n_sightings[index] += 1
        if self._n_sightings[index] > MAX_SIGHTINGS:
            return None
        return Sighting(
            watch=watch,
            request=self,
            raised=crossing.raised,
            position=position,
            score=crossing.score,
            aggregate=crossing.aggregate,
            token_ids=(*self.prompt, *self.generated)[: position + 1]
            if watch.wants_text and self.wants_text
            else (),
        )

    def _react(self, index: int, watch: Watch, crossing: Crossing, position: int) -> None:
        if watch.action is MonitorAction.OBSERVE:
            return
        threshold = watch.rule.on_above
        if len(self.flags) < MAX_FLAGS:
            self.flags.append(
                MonitorFlag(
                    monitor=watch.name,
                    position=position,
                    score=crossing.aggregate,
                    threshold=threshold,
                    action=watch.action,
                )
            )
        if watch.action is MonitorAction.STEER:
            if index not in self.steering:
                self.ranges.setdefault(index, []).append((self._next_fed(position), FOREVER))
                self.n_turns += 1
            self.steering[index] = self.steers[index]
            self.steered.add(index)
        elif watch.action is MonitorAction.ABORT and self.abort is None:
            self.abort = Abort(
                monitor=watch.name, position=position, score=crossing.aggregate, threshold=threshold
            )

    def _release(self, index: int, position: int) -> None:
        low, _ = self.ranges[index].pop()
        stop = self._next_fed(position)
        if stop > low:
            self.ranges[index].append((low, stop))
        self.n_turns += 1

    def _next_fed(self, position: int) -> int:
        """The first position that what is seen at `position` can change: a prompt is fed under the edits it began with."""
        return max(position + 1, len(self.prompt))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """The rows of a pass under one roster, R of them."""

    roster: Roster
    scoring: ScorePass
    rows: Sequence[int]
    watches: Sequence[RequestWatch]
    slots_R: Slots
    # What counts at a generated position; `everyone`: all of it.
    base_RM: Masks
    everyone: bool


class WatchedPass:
    """The watches of one pass: one a row of the batch, None where none looks. What it is made of holds for every pass over
    the same rows.
    """

    def __init__(self, watches: Sequence[RequestWatch | None], *, one_token: bool) -> None:
        rows: dict[int, list[int]] = {}
        for row, watch in enumerate(watches):
            if watch is not None:
                rows.setdefault(id(watch.roster), []).append(row)
        self._parts = [_part(watches, chosen, one_token) for chosen in rows.values()]
        self.points = frozenset(name for part in self._parts for name in part.roster.columns.points)

    def begin(self) -> None:
        """A pass begins."""
        for part in self._parts:
            part.scoring.begin()

    def at(self, name: str, tensor: Any, *, may_change: bool) -> None:
        """A hook point ran; (B, T, W)."""
        for part in self._parts:
            roster = part.roster
            if roster.broken or name not in roster.columns.at:
                continue
            try:
                part.scoring.at(name, tensor, may_change=may_change)
            except Exception as error:
                roster.breaks(error)

    def give(self, columns: Sequence[int], scores_TC: Floats) -> None:
        """The scores of some watches over the positions of this pass, which is of one row, computed elsewhere."""
        (part,) = self._parts
        part.scoring.give(columns, scores_TC[None])

    def conclude_step(self, positions: Sequence[int], token_ids: Sequence[int]) -> bool:
        """Steps the rules over a pass of one generated token a row: `positions` and `token_ids` are the rows'. Returns
        whether edits in force have changed.
        """
        changed = False
        for part in self._parts:
            if not part.roster.broken:
                try:
                    changed |= self._step(part, positions, token_ids)
                except Exception as error:
                    part.roster.breaks(error)
        return changed

    def conclude_prompts(self, spans: Sequence[Span]) -> None:
        """Steps the rules over the prompts' positions in `spans`, one a row. Edits take force with the next pass."""
        for part in self._parts:
            if not part.roster.broken:
                try:
                    self._run(part, spans)
                except Exception as error:
                    part.roster.breaks(error)

    def _step(self, part: _Part, positions: Sequence[int], token_ids: Sequence[int]) -> bool:
        roster, scores_RM, use_RM = part.roster, part.scoring.scores()[:, 0], part.base_RM
        everyone = part.everyone
        if not roster.skip_token_ids.isdisjoint(token_ids):
            skipped = np.array([token_ids[row] in roster.skip_token_ids for row in part.rows])
            use_RM = use_RM & ~(skipped[:, None] & roster.skips_M)
            everyone = False
        for column in part.scoring.pooling:
            for place in np.flatnonzero(use_RM[:, column]):
                self._pool(part, int(place), column, np.ones(1, dtype=bool), scores_RM[place : place + 1])
        roster.log.add(scores_RM, use_RM)
        crossings = roster.rules.step(part.slots_R, scores_RM, None if everyone else use_RM)
        if not crossings:
            return False
        return _follow(
            roster,
            [
                (part.watches[crossing.place], crossing, positions[part.rows[crossing.place]])
                for crossing in crossings
            ],
        )

    def _run(self, part: _Part, spans: Sequence[Span]) -> None:
        roster, scores_RTM = part.roster, part.scoring.scores()
        for place, (row, watch) in enumerate(zip(part.rows, part.watches, strict=True)):
            span = spans[row]
            n_fed = len(span.token_ids)
            scores_TM = scores_RTM[place, :n_fed]
            use_TM = np.broadcast_to(watch.watched_M & roster.on_prompt_M, scores_TM.shape)
            if roster.skip_token_ids:
                skipped = np.array([token in roster.skip_token_ids for token in span.token_ids], dtype=bool)
                use_TM = use_TM & ~(skipped[:, None] & roster.skips_M)
            for column in part.scoring.pooling:
                if use_TM[:, column].any():
                    self._pool(part, place, column, use_TM[:, column], scores_TM)
            roster.log.add(scores_TM, use_TM)
            crossings = roster.rules.run(watch.slot, scores_TM, use_TM)
            _follow(roster, [(watch, crossing, span.start + crossing.place) for crossing in crossings])

    @staticmethod
    def _pool(part: _Part, place: int, column: int, chosen_T: Masks, scores_TM: Floats) -> None:
        pools = part.watches[place].pools
        scores_TM[chosen_T, column] = part.scoring.pooled(place, column, chosen_T, pools)


def watched_pass(watches: Sequence[RequestWatch | None], *, one_token: bool = False) -> WatchedPass | None:
    """The watches of a pass, None where nobody looks at any of its rows. `one_token`: of decoding steps of these rows."""
    looking = any(watch is not None for watch in watches)
    return WatchedPass(watches, one_token=one_token) if looking else None


def _part(watches: Sequence[RequestWatch | None], rows: Sequence[int], one_token: bool) -> _Part:
    chosen = [watch for row in rows if (watch := watches[row]) is not None]
    roster = chosen[0].roster
    base_RM = np.stack([watch.watched_M & roster.on_generated_M for watch in chosen])
    return _Part(
        roster=roster,
        scoring=ScorePass(
            columns=roster.columns,
            n_rows=len(rows),
            rows=None if len(rows) == len(watches) else rows,
            one_token=one_token,
        ),
        rows=rows,
        watches=chosen,
        slots_R=np.array([watch.slot for watch in chosen], dtype=np.int64),
        base_RM=base_RM,
        everyone=bool(base_RM.all()),
    )


def _follow(roster: Roster, crossed: Sequence[tuple[RequestWatch, Crossing, int]]) -> bool:
    """Does what each crossing asks for, and reports. Returns whether edits in force may have changed."""
    sightings = [
        seen for watch, crossing, position in crossed if (seen := watch.take(crossing, position)) is not None
    ]
    if sightings:
        roster.report(sightings)
    return any(roster.watches[crossing.rule].action is MonitorAction.STEER for _, crossing, _ in crossed)


def prepare_steering(
    watch: RequestWatch, make: Callable[[Sequence[Intervention]], tuple[PreparedIntervention, ...]]
) -> None:
    """Makes the edits ready that may steer the request."""
    for index in watch.needs_edits:
        one = watch.roster.watches[index]
        try:
            watch.steers[index] = make(one.interventions)
        except ServingError as error:
            # Something it needs has gone since. That is the monitor's affair, not the caller's.
            watch.watched_M = watch.watched_M.copy()
            watch.watched_M[index] = False
            watch.roster.on_failure(one, error)
