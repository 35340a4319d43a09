"""What monitors notice becomes events, and goes to whoever is to hear of it.

The engine's thread reports what crossed a threshold, the counting thread what has drifted; on the event loop each becomes
an event, and goes to listeners, to the registry's log, and to a webhook, each behind a bounded queue.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Counts
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import Sighting, Watch
from glasshouse.server.monitors.events import MAX_TEXT, Event, EventBus, new_id, to_log
from glasshouse.server.monitors.recorder import EventRecorder
from glasshouse.server.monitors.running import Monitor
from glasshouse.server.monitors.spec import EventKind, Subject
from glasshouse.server.monitors.statistics import DriftChange
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.types.conditions import MonitorAction

FindMonitor = Callable[[Reference], Monitor | None]
"""The monitor in force under a name, whatever its version."""


@dataclass(frozen=True, kw_only=True)
class MonitorCounts:
    """What the metrics page shows, besides what monitors hold themselves."""

    events: Mapping[tuple[str, str], int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    webhooks: Mapping[tuple[str, str], int] = field(default_factory=dict)


class Hearing:
    """From reports to events. Lives on the event loop; `report` and `report_drift` are called by other threads."""

    def __init__(self, engines: Mapping[str, Engine], server: str) -> None:
        self._engines = engines
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._recorder: EventRecorder | None = None
        self._events: Counts[tuple[str, str]] = Counts()
        self._deliveries: Counts[tuple[str, str]] = Counts()
        self.bus = EventBus()

    def record(self, recorder: EventRecorder) -> None:
        """Events go to the registry's log from now on."""
        self._recorder = recorder
        recorder.start()

    def stop_recording(self) -> None:
        """Writes what is queued, as far as a few seconds go. Blocks."""
        if self._recorder is not None:
            self._recorder.stop()

    async def settled(self, timeout_s: float = 5.0) -> bool:
        """Waits until every event so far is in the registry's log; whether it was in time."""
        recorder = self._recorder
        return recorder is None or await asyncio.to_thread(recorder.flush, timeout_s)

    def report(self, sightings: Sequence[Sighting], find: FindMonitor) -> None:
        """What crossed a threshold; in the engine's thread. `find` is asked on the event loop."""
        # The loop may be closed: nobody is left to listen.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, sightings, find)

    def report_drift(self, changes: Sequence[tuple[Monitor, DriftChange]]) -> None:
        """What has drifted, or does no more; in the counting thread."""
        if changes and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take_drift, changes)

    def count_delivery(self, monitor: Monitor, outcome: str) -> None:
        """How a webhook's delivery ended."""
        self._deliveries[monitor.published.name, outcome] += 1
        if outcome == "failed":
            monitor.statistics.n_webhook_failures += 1
        elif outcome == "dropped":
            monitor.statistics.n_dropped += 1

    def counts(self) -> MonitorCounts:
        """For the metrics page; from any thread."""
        return MonitorCounts(
            events=dict(self._events.copy()),
            dropped={
                "registry": 0 if self._recorder is None else self._recorder.n_dropped,
                "watch": self.bus.n_dropped,
            },
            webhooks=dict(self._deliveries.copy()),
        )

    def _take(self, sightings: Sequence[Sighting], find: FindMonitor) -> None:
        for seen in sightings:
            reference = reference_of(seen.watch)
            monitor = find(reference)
            subject: Subject = seen.request.origin
            rule = seen.watch.rule
            off = rule.on_above if rule.off_below is None else rule.off_below
            now = datetime.now(tz=UTC)
            text = ""
            if seen.token_ids and subject.tell_text:
                engine = self._engines[reference.model]
                special = engine.info.special_token_ids
                said = [token for token in seen.token_ids if token not in special]
                text = engine.codec.decode(said)[-MAX_TEXT:]
            if monitor is not None and seen.raised:
                monitor.statistics.n_raised += 1
            self._publish(
                Event(
                    id=new_id(now),
                    monitor=reference,
                    kind=EventKind.RAISED if seen.raised else EventKind.CLEARED,
                    action=seen.watch.action,
                    time=now,
                    request_id=subject.request_id,
                    position=seen.position,
                    score=seen.score,
                    aggregate=seen.aggregate,
                    threshold=rule.on_above if seen.raised else off,
                    labels=subject.labels,
                    key=subject.key,
                    text=text,
                    server=self._server,
                ),
                monitor,
            )

    def _publish(self, event: Event, monitor: Monitor | None) -> None:
        if event.kind is EventKind.RAISED:
            self._events[event.monitor.name, event.action.value] += 1
        elif event.kind is EventKind.DRIFT:
            self._events[event.monitor.name, "drift"] += 1
        self.bus.publish(event)
        dropped = self._recorder is not None and self._recorder.add(to_log(event))
        if monitor is not None:
            monitor.statistics.n_dropped += dropped
            if monitor.webhook is not None:
                monitor.webhook.offer(event)

    def _take_drift(self, changes: Sequence[tuple[Monitor, DriftChange]]) -> None:
        for monitor, (_, drift, moved) in changes:
            now = datetime.now(tz=UTC)
            event = Event(
                id=new_id(now),
                monitor=monitor.published.reference,
                kind=EventKind.DRIFT if moved else EventKind.DRIFT_CLEARED,
                action=MonitorAction.OBSERVE,
                time=now,
                drift=drift,
                server=self._server,
            )
            self._publish(event, monitor)


def reference_of(watch: Watch) -> Reference:
    """The version of a monitor that a watch is of."""
    _, model, _, rest = watch.name.split("/", 3)
    short, _, version = rest.partition("@")
    return Reference(kind=Kind.MONITOR, model=model, name=short, version=int(version))
