"""The monitors' log, on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from glasshouse.server.registry.events import MonitorEvent
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.errors import InvalidArgument

START = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
SAD = Reference(kind=Kind.MONITOR, model="fable", name="sad", version=1)


def event(number: int, monitor: Reference = SAD) -> MonitorEvent:
    return MonitorEvent(
        monitor=monitor,
        event="raised",
        action="abort",
        time=START + timedelta(seconds=number),
        request_id=f"r{number}",
        position=number,
        score=number / 10,
        details={"n": number},
    )


def test_events_come_back_newest_first_by_pages(registry: Registry) -> None:
    log = registry.events
    log.append([event(n) for n in range(10)])
    log.append([event(99, replace(SAD, name="other")), event(100, replace(SAD, version=2))])
    log.append([])
    first = log.read(SAD, limit=4)
    assert [e.position for e in first] == [9, 8, 7, 6]
    assert replace(first[0], id=0) == event(9)
    rest = log.read(SAD, before_id=first[-1].id)
    assert [e.position for e in rest] == [5, 4, 3, 2, 1, 0]
    assert [e.position for e in log.read(SAD, since=START + timedelta(seconds=8))] == [9, 8]
    assert [e.position for e in log.read(replace(SAD, version=None), limit=2)] == [100, 9]


def test_retention(registry: Registry) -> None:
    log = registry.events
    log.append([event(n) for n in range(10)] + [event(n, replace(SAD, name="quiet")) for n in range(4)])
    assert log.purge(older_than=START + timedelta(seconds=2), keep_at_most=5) == 5 + 2
    assert [e.position for e in log.read(SAD)] == [9, 8, 7, 6, 5]
    assert [e.position for e in log.read(replace(SAD, name="quiet"))] == [3, 2]
    assert log.purge(older_than=START, keep_at_most=5) == 0


def test_all_of_a_batch_or_nothing(registry: Registry) -> None:
    for wrong in (
        replace(event(1), monitor=replace(SAD, version=None)),
        replace(event(1), details={"x": object()}),
    ):
        with pytest.raises(InvalidArgument) as caught:
            registry.events.append([event(0), wrong])
        assert caught.value.field.startswith("events[1].")
    assert registry.events.read(SAD) == ()
