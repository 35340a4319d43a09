"""What monitors notice, as it happens: events, and whoever listens to them.

An event's id is its time in microseconds, in hex, and a random part: ids sort by time, and name a place to go on from.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from glasshouse.server.monitors.spec import EventKind
from glasshouse.server.probes.drift import Drift
from glasshouse.server.registry import events as log
from glasshouse.server.registry.names import Reference
from glasshouse.server.types.conditions import MonitorAction

MAX_TEXT = 2000
MAX_BACKLOG = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """One event. `monitor` has its version. `position` and `score` belong to a token, and are None of drift."""

    id: str
    monitor: Reference
    kind: EventKind
    action: MonitorAction
    time: datetime
    request_id: str = ""
    position: int | None = None
    score: float | None = None
    aggregate: float | None = None
    threshold: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    text: str = ""
    drift: Drift | None = None
    server: str = ""

    @property
    def model(self) -> str:
        """Of which model."""
        return self.monitor.model


def new_id(time: datetime) -> str:
    """An id of an event at `time`."""
    return f"{round(time.timestamp() * 1e6):016x}-{secrets.token_hex(6)}"


def time_of(event_id: str) -> datetime | None:
    """When the event with this id happened; None of what is no id."""
    stamp, dash, rest = event_id.partition("-")
    if not dash or len(stamp) != 16 or len(rest) != 12:
        return None
    try:
        return datetime.fromtimestamp(int(stamp, 16) / 1e6, tz=UTC)
    except (ValueError, OverflowError, OSError):
        return None


def to_log(event: Event) -> log.MonitorEvent:
    """An event as the registry keeps it."""
    details: dict[str, Any] = {"id": event.id}
    for name in ("score", "threshold"):
        if getattr(event, name) is not None:
            details[name] = getattr(event, name)
    for name in ("key", "text", "server"):
        if getattr(event, name):
            details[name] = getattr(event, name).replace("\0", "")
    if event.labels:
        details["labels"] = {key: value.replace("\0", "") for key, value in event.labels.items()}
    if event.drift is not None:
        details["drift"] = {
            "population_stability_index": event.drift.population_stability_index,
            "ks_statistic": event.drift.ks_statistic,
            "ks_p_value": event.drift.ks_p_value,
            "n_live": event.drift.n_live,
        }
    return log.MonitorEvent(
        monitor=event.monitor,
        event=event.kind.value,
        action=event.action.value,
        time=event.time,
        request_id=event.request_id,
        position=-1 if event.position is None else event.position,
        score=event.aggregate,
        details=details,
    )


def from_log(kept: log.MonitorEvent) -> Event | None:
    """The event of `to_log`; None of one that a newer server wrote and this one does not know."""
    details = kept.details
    try:
        return Event(
            id=details["id"],
            monitor=kept.monitor,
            kind=EventKind(kept.event),
            action=MonitorAction(kept.action),
            time=kept.time,
            request_id=kept.request_id,
            position=None if kept.position < 0 else kept.position,
            score=details.get("score"),
            aggregate=kept.score,
            threshold=details.get("threshold"),
            labels=details.get("labels", {}),
            key=details.get("key", ""),
            text=details.get("text", ""),
            drift=Drift(**details["drift"]) if "drift" in details else None,
            server=details.get("server", ""),
        )
    except (KeyError, TypeError, ValueError):
        return None


class Subscription:
    """Events for one listener, the newest `max_backlog` of those not yet read. On the event loop alone."""

    def __init__(self, wanted: Callable[[Event], bool], max_backlog: int) -> None:
        self._wanted = wanted
        self._events: deque[Event] = deque(maxlen=max_backlog)
        self._n_dropped = 0
        self._news = asyncio.Event()
        self.closed = False

    def offer(self, event: Event) -> bool:
        """Takes an event if it is wanted; whether an older one was dropped for it."""
        if not self._wanted(event):
            return False
        full = len(self._events) == self._events.maxlen
        self._n_dropped += full
        self._events.append(event)
        self._news.set()
        return full

    def close(self) -> None:
        """No more events."""
        self.closed = True
        self._news.set()

    async def wait(self) -> None:
        """Returns when there is something to take, or nothing ever will be."""
        await self._news.wait()

    def take(self) -> tuple[list[Event], int]:
        """The events not yet read, oldest first, and how many were dropped before them."""
        events, dropped = list(self._events), self._n_dropped
        self._events.clear()
        self._n_dropped = 0
        if not self.closed:
            self._news.clear()
        return events, dropped


class EventBus:
    """Hands events to subscriptions. On the event loop alone."""

    def __init__(self, max_backlog: int = MAX_BACKLOG) -> None:
        self._max_backlog = max_backlog
        self._subscriptions: set[Subscription] = set()
        self.n_dropped = 0
        self._closed = False

    def subscribe(self, wanted: Callable[[Event], bool]) -> Subscription:
        """Listens from now on; to be given back with `unsubscribe`."""
        made = Subscription(wanted, self._max_backlog)
        if self._closed:
            made.close()
        self._subscriptions.add(made)
        return made

    def unsubscribe(self, subscription: Subscription) -> None:
        """Listens no more."""
        self._subscriptions.discard(subscription)

    def publish(self, event: Event) -> None:
        """Gives an event to all who want it."""
        for subscription in self._subscriptions:
            self.n_dropped += subscription.offer(event)

    def close(self) -> None:
        """Ends every subscription, and those that are made after it."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()
