"""Events on their way to the registry, while it takes them and while it does not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from glasshouse.server.monitors.recorder import EventRecorder
from glasshouse.server.registry.events import EventLog, MonitorEvent
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.errors import Unavailable
from glasshouse.wire import reasons

SAD = Reference(kind=Kind.MONITOR, model="fable", name="sad", version=1)


def event(index: int, age: timedelta = timedelta()) -> MonitorEvent:
    time = datetime.now(tz=UTC) - age
    return MonitorEvent(monitor=SAD, event="raised", action="flag", time=time, request_id=f"r-{index}")


class Sometimes(EventLog):
    """A log whose database is away while `away` is set."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry._database)
        self.away = threading.Event()
        self.tried = threading.Event()

    def append(self, events: Sequence[MonitorEvent]) -> None:
        self.tried.set()
        if self.away.is_set():
            raise Unavailable("away", reason=reasons.REGISTRY_UNAVAILABLE)
        super().append(events)


def recorder(log: EventLog, **rest: int) -> EventRecorder:
    made = EventRecorder(
        log, max_queued=rest.pop("max_queued", 100), retention_days=30, keep_at_most=rest.pop("keep", 1000)
    )
    made.start()
    return made


def test_events_wait_for_the_database_in_order(tmp_path: Path) -> None:
    registry = Registry.at(tmp_path)
    log = Sometimes(registry)
    log.away.set()
    writing = recorder(log)
    for index in range(5):
        assert not writing.add(event(index))
    assert log.tried.wait(10)
    assert not writing.flush(0.05)
    log.away.clear()
    assert writing.flush(30) and writing.n_written == 5 and writing.n_dropped == 0
    writing.stop()
    assert [kept.request_id for kept in log.read(SAD)] == [f"r-{index}" for index in (4, 3, 2, 1, 0)]
    registry.close()


def test_a_full_queue_loses_the_oldest_and_says_so(tmp_path: Path) -> None:
    registry = Registry.at(tmp_path)
    log = Sometimes(registry)
    log.away.set()
    writing = recorder(log, max_queued=4)
    for index in range(10):
        writing.add(event(index))
    log.away.clear()
    assert writing.flush(30)
    writing.stop()
    kept = [one.request_id for one in log.read(SAD)]
    assert writing.n_written + writing.n_dropped == 10 and writing.n_dropped >= 1
    assert len(kept) == writing.n_written and kept[0] == "r-9"
    registry.close()


def test_what_is_old_goes(tmp_path: Path) -> None:
    registry = Registry.at(tmp_path)
    log = registry.events
    log.append([event(index, age=timedelta(days=40)) for index in range(3)])
    log.append([event(index) for index in range(3, 13)])
    writing = recorder(log, keep=6)
    writing.add(event(13))
    assert writing.flush(30)
    for _ in range(200):
        if len(log.read(SAD)) <= 6:
            break
        threading.Event().wait(0.05)
    writing.stop()
    assert len(log.read(SAD)) == 6
    registry.close()
