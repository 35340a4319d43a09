"""The monitors that may steer a request, as its plan carries them: what the worker needs to decide when their edits begin.

1. The gateway resolves everything: which monitors look at the request, what they score, their rules, their edits.
2. The plan holds those edits like any others, but each names its watch and lies dormant until that has been raised.
3. After a pass the worker scores, steps the rules (`engines.watching`, which the gateway runs too) and knows, before it
   lays out the next one, at which positions each watch's edits are in force.
4. It sends the scores. The gateway steps the same rules over the same numbers, for events and flags, and so knows where
   edits must have been applied: the account says whether they were.

A position is scored once, when it first runs, so what was decided about it stays decided when it runs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from glasshouse.server.engines.watching import Watch
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.probes.aggregation import Rule
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.readouts.score_columns import FeatureColumnSource, ProbeColumnSource
from glasshouse.server.types.conditions import ProbeOutput

from .clauses import Clause

Ranges = Sequence[tuple[int, int]]

# The readout that asks a worker for the scores of a request's watches, one a position and watch; and the index from which
# the edits of watches count, beyond any that a caller may have.
SCORES = -2_000_000
FIRST_EDIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WatchPlan:
    """One watch that may steer. kind "probe": `column` of `probe`, its log-odds where `margin`; "feature": `feature` of
    `dictionary`. Both read `sites`.
    """

    kind: Literal["probe", "feature"]
    sites: tuple[str, ...]
    rule: Rule
    on_prompt: bool
    on_generated: bool
    while_on: bool
    skip_token_ids: tuple[int, ...] = ()
    probe: str = ""
    column: int = 0
    margin: bool = False
    dictionary: str = ""
    feature: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """The watches that may steer one request, with the edits of each, made ready for it."""

    watches: tuple[Watch, ...]
    edits: tuple[tuple[PreparedIntervention, ...], ...]
    n_prompt: int

    @property
    def probes(self) -> list[ServedProbe]:
        """The probes that workers must hold for it."""
        sources = [watch.source for watch in self.watches]
        return [source.probe for source in sources if isinstance(source, ProbeColumnSource)]

    def plans(self, dictionaries: Mapping[str, str], probes: Mapping[int, str]) -> tuple[WatchPlan, ...]:
        """Its watches as workers take them; the keys as in `plan.plan_request`."""
        return tuple(_plan(watch, dictionaries, probes) for watch in self.watches)


def _plan(watch: Watch, dictionaries: Mapping[str, str], probes: Mapping[int, str]) -> WatchPlan:
    source = watch.source
    plan = WatchPlan(
        kind="feature",
        sites=tuple(point.name for point in source.points),
        rule=watch.rule,
        on_prompt=watch.on_prompt,
        on_generated=watch.on_generated,
        while_on=watch.steer_while_on,
        skip_token_ids=tuple(sorted(watch.skip_token_ids)),
    )
    match source:
        case FeatureColumnSource(dictionary=dictionary, feature=feature):
            return replace(plan, dictionary=dictionaries[dictionary.facts.name], feature=feature)
        case ProbeColumnSource(probe=probe, column=column, output=output):
            margin = output is ProbeOutput.MARGIN
            return replace(plan, kind="probe", probe=probes[id(probe)], column=column, margin=margin)


def within(clause: Clause, in_force: Ranges) -> Clause:
    """The clause of an edit, at the positions alone where its watch has it in force; both ascending."""
    ranges = tuple(
        (max(low, start), min(high, stop))
        for low, high in clause.ranges
        for start, stop in in_force
        if max(low, start) < min(high, stop)
    )
    return replace(clause, ranges=ranges)
