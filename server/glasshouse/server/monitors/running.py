"""The monitors in force on this server, and the rosters that engines run for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

import numpy as np

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import RequestWatch, Roster, Sighting, Watch
from glasshouse.server.monitors.spec import MonitorSpec, Subject
from glasshouse.server.monitors.statistics import (
    ACTIVATION_BOUNDS,
    MARGIN_BOUNDS,
    PROBABILITY_BOUNDS,
    DriftChange,
    DriftState,
    MonitorStatistics,
    ScoreCounts,
    count,
)
from glasshouse.server.monitors.webhooks import Webhook
from glasshouse.server.registry.names import Reference
from glasshouse.server.types.conditions import FeatureColumn, ProbeOutput
from glasshouse.server.types.errors import ServingError
from glasshouse.server.types.models import ModelInfo


class State(Enum):
    """Whether a monitor does its work here."""

    RUNNING = "running"
    DISABLED = "disabled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, eq=False)
class Published:
    """A version of a monitor as it was published."""

    reference: Reference
    spec: MonitorSpec
    author: str
    created: datetime

    @property
    def name(self) -> str:
        """Its name within its model, without the version."""
        return self.reference.name


@dataclass(eq=False, kw_only=True)
class Monitor:
    """A monitor in force. `reason`: why it does not run, or what is amiss though it does."""

    published: Published
    state: State
    reason: str = ""
    watch: Watch | None = None
    webhook: Webhook | None = None
    statistics: MonitorStatistics = field(default_factory=lambda: MonitorStatistics(ScoreCounts(())))

    @property
    def scored(self) -> str:
        """What it scores, as the label of a metric: `probe@version`, with its label where it has several, or
        `dictionary/feature`.
        """
        source = self.published.spec.source
        if isinstance(source, FeatureColumn):
            return f"{source.dictionary.rpartition('/dictionaries/')[2]}/{source.feature}"
        short = source.probe.rpartition("/")[2]
        return f"{short}/{source.label}" if source.label else short


def new_statistics(spec: MonitorSpec) -> MonitorStatistics:
    """Nothing counted yet."""
    bounds: tuple[float, ...]
    if isinstance(spec.source, FeatureColumn):
        bounds = ACTIVATION_BOUNDS
    else:
        bounds = PROBABILITY_BOUNDS if spec.source.output is ProbeOutput.SCORE else MARGIN_BOUNDS
    return MonitorStatistics(
        ScoreCounts(bounds), drift=None if spec.drift is None else DriftState(spec.drift)
    )


async def compile_watch(published: Published, engine: Engine) -> Watch:
    """The watch that an engine runs for a monitor.

    Raises:
        ServingError: something that it needs is not here, or does not fit the model.
    """
    spec, info = published.spec, engine.info
    source = await engine.score_source(spec.source, field="spec")
    steering = await engine.steering(spec.interventions, field="spec")
    return Watch(
        name=str(published.reference),
        source=source,
        rule=spec.rule,
        on_prompt=spec.on_prompt,
        on_generated=spec.on_generated,
        skip_token_ids=_skipped(spec, info),
        action=spec.action,
        interventions=steering,
        steer_while_on=spec.steer_while_on,
        wants_text=spec.include_text,
    )


def _skipped(spec: MonitorSpec, info: ModelInfo) -> frozenset[int]:
    if spec.positions.exclude_special:
        return frozenset(info.special_token_ids)
    if spec.positions.exclude_bos and info.bos_token_id is not None:
        return frozenset([info.bos_token_id])
    return frozenset()


@dataclass(frozen=True, eq=False, kw_only=True)
class _Running:
    roster: Roster
    monitors: tuple[Monitor, ...]
    # Every request is watched by every monitor: no filter has anything to say.
    unfiltered: bool


class Rosters:
    """One roster a model at a time, and those before it for as long as requests run under them."""

    def __init__(self) -> None:
        self._now: dict[str, _Running] = {}
        self._before: list[_Running] = []

    def put(
        self,
        model: str,
        monitors: Sequence[Monitor],
        report: Callable[[Sequence[Sighting]], None],
        on_failure: Callable[[Watch, ServingError], None],
        on_break: Callable[[Roster, Exception], None],
    ) -> None:
        """Makes `monitors`, those that run, the ones that requests of `model` are watched by from now on."""
        old = self._now.pop(model, None)
        if old is not None:
            self._before.append(old)
        if not monitors:
            return
        filters = [monitor.published.spec.filter for monitor in monitors]
        watches = [monitor.watch for monitor in monitors]
        self._now[model] = _Running(
            roster=Roster(
                [watch for watch in watches if watch is not None],
                report,
                on_failure=on_failure,
                on_break=on_break,
            ),
            monitors=tuple(monitors),
            unfiltered=all(
                not chosen.keys and not chosen.labels and chosen.sampling_rate >= 1.0 for chosen in filters
            ),
        )

    def attach(self, model: str, subject: Subject) -> RequestWatch | None:
        """What watches a request; None where nothing does."""
        running = self._now.get(model)
        if running is None:
            return None
        if running.unfiltered:
            watched = np.ones(len(running.monitors), dtype=bool)
        else:
            watched = np.array(
                [
                    monitor.published.spec.filter.chooses(subject, monitor.published.name)
                    for monitor in running.monitors
                ]
            )
            if not watched.any():
                return None
        for monitor, on in zip(running.monitors, watched, strict=True):
            monitor.statistics.n_requests += bool(on)
        return RequestWatch(running.roster, watched, origin=subject, tell_text=subject.tell_text)

    def count(self) -> list[tuple[Monitor, DriftChange]]:
        """Counts the scores of all rosters; what has drifted. From one thread."""
        changes = []
        before = list(self._before)
        for running in (*before, *tuple(self._now.values())):
            # Asked before the log is read: a request that ends in between has logged what it had.
            over = running in before and not running.roster.requests
            found = count(running.roster, [monitor.statistics for monitor in running.monitors])
            changes += [(running.monitors[change[0]], change) for change in found]
            if over:
                self._before.remove(running)
        return changes
