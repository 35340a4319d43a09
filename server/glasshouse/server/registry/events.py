"""What monitors noticed, kept for a while: an append-only log beside the registry, in the same database.

1. Servers append events in batches, from a thread of their own, one short transaction each. The lock of publishers is
   not taken; SQLite, which has one lock for all writing, is held for that transaction alone.
2. Events are read back newest first, by monitor and time.
3. Retention: `purge` removes what is older than an age, and beyond a number for each monitor the oldest.

An event holds no text unless whoever made it put some into `details`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import RowMapping, delete, func, insert, select

from glasshouse.server.registry.database import Database
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import dump
from glasshouse.server.registry.tables import monitor_events
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

MAX_PAGE = 1000


@dataclass(frozen=True, kw_only=True)
class MonitorEvent:
    """One event. `event`: what happened (raised, cleared, drift, ...); `action`: what was done; `position`: of the token
    fed in, -1 where it belongs to none; `score`: the aggregate; `time` in UTC. `id` is given by the log.
    """

    monitor: Reference
    event: str
    action: str
    time: datetime
    request_id: str = ""
    position: int = -1
    score: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    id: int = 0


class EventLog:
    """The log on a database that is migrated. Safe to use from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, events: Sequence[MonitorEvent]) -> None:
        """Writes all of `events` or none.

        Raises:
            InvalidArgument: a monitor without its version, or details that are not JSON.
            Unavailable: the database does not answer; what the caller holds is still theirs to keep or drop.
        """
        rows = [_row(event, index) for index, event in enumerate(events)]
        if rows:
            with self._database.writing() as connection:
                connection.execute(insert(monitor_events), rows)

    def read(
        self,
        monitor: Reference,
        *,
        since: datetime | None = None,
        before_id: int | None = None,
        limit: int = 100,
    ) -> tuple[MonitorEvent, ...]:
        """Events of a monitor (of every version where it names none), newest first: at most `limit` of those at or after
        `since` with ids below `before_id`, which is how the next page is asked for.
        """
        wanted = select(monitor_events).where(
            monitor_events.c.model == monitor.model, monitor_events.c.monitor == monitor.name
        )
        if monitor.version is not None:
            wanted = wanted.where(monitor_events.c.version == monitor.version)
        if since is not None:
            wanted = wanted.where(monitor_events.c.time_us >= _microseconds(since))
        if before_id is not None:
            wanted = wanted.where(monitor_events.c.id < before_id)
        ordered = wanted.order_by(monitor_events.c.id.desc()).limit(max(1, min(limit, MAX_PAGE)))
        with self._database.reading() as connection:
            return tuple(_event(row) for row in connection.execute(ordered).mappings())

    def purge(self, *, older_than: datetime, keep_at_most: int) -> int:
        """Removes events before `older_than`, and of each monitor the oldest beyond `keep_at_most`; returns how many."""
        place = func.row_number().over(
            partition_by=(monitor_events.c.model, monitor_events.c.monitor),
            order_by=monitor_events.c.id.desc(),
        )
        numbered = select(monitor_events.c.id, place.label("place")).subquery()
        surplus = select(numbered.c.id).where(numbered.c.place > keep_at_most)
        old = monitor_events.c.time_us < _microseconds(older_than)
        with self._database.writing() as connection:
            return connection.execute(
                delete(monitor_events).where(old | monitor_events.c.id.in_(surplus))
            ).rowcount


def _row(event: MonitorEvent, index: int) -> dict[str, Any]:
    if event.monitor.kind is not Kind.MONITOR or event.monitor.version is None:
        raise InvalidArgument(
            f"{event.monitor} is not one version of a monitor",
            reason=reasons.VALUE_MALFORMED,
            field=f"events[{index}].monitor",
            value=str(event.monitor),
            remedy="name the version that noticed it",
        )
    return {
        "model": event.monitor.model,
        "monitor": event.monitor.name,
        "version": event.monitor.version,
        "event": event.event,
        "action": event.action,
        "time_us": _microseconds(event.time),
        "request_id": event.request_id,
        "position": event.position,
        "score": event.score,
        "details": dump(dict(event.details), field=f"events[{index}].details"),
    }


def _event(row: RowMapping) -> MonitorEvent:
    monitor = Reference(
        kind=Kind.MONITOR, model=row["model"], name=row["monitor"], version=int(row["version"])
    )
    return MonitorEvent(
        monitor=monitor,
        event=row["event"],
        action=row["action"],
        time=datetime.fromtimestamp(row["time_us"] / 1e6, tz=UTC),
        request_id=row["request_id"],
        position=int(row["position"]),
        score=row["score"],
        details=json.loads(row["details"]),
        id=int(row["id"]),
    )


def _microseconds(time: datetime) -> int:
    return round(time.timestamp() * 1e6)
