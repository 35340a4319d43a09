"""Lanes: turns, bounds, and an end within a batch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from glasshouse.server.operations.attribution.lanes import Lane, Stopped, Ticket
from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import InvalidArgument, ResourceExhausted, Unavailable


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane("test", 1, AttributionSettings(max_queued=2))
    yield made
    made.stop()


async def test_work_is_done_in_its_thread_and_its_errors_come_back(lane: Lane) -> None:
    assert await lane.run(lambda ticket: threading.current_thread().name.startswith("glasshouse-test"))

    def bad(ticket: Ticket) -> None:
        raise InvalidArgument("no", reason="VALUE_MALFORMED", field="x")

    with pytest.raises(InvalidArgument):
        await lane.run(bad)
    assert await lane.run(lambda ticket: 3) == 3


async def test_a_long_iteration_lets_others_take_turns(lane: Lane) -> None:
    order: list[str] = []

    def numbers(ticket: Ticket) -> Iterator[int]:
        for n in range(100):
            order.append("item")
            yield n

    stream = lane.iterate(numbers)
    assert await anext(stream) == 0
    await lane.run(lambda ticket: order.append("call"))
    assert await anext(stream) == 1
    assert order == ["item", "call", "item"], "nothing is computed that nobody asked for"
    await stream.aclose()


async def test_leaving_ends_work_at_its_next_step(lane: Lane) -> None:
    begun, ended = threading.Event(), threading.Event()

    def forever(ticket: Ticket) -> None:
        try:
            while True:
                begun.set()
                ticket(1, 2)
        except Stopped:
            ended.set()
            raise

    task = asyncio.create_task(lane.run(forever))
    await asyncio.to_thread(begun.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(ended.wait, 5)
    assert await lane.run(lambda ticket: 1) == 1


async def test_what_would_wait_too_long_is_refused(lane: Lane) -> None:
    gate = threading.Event()
    tasks = [asyncio.create_task(lane.run(lambda ticket: gate.wait(10))) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as caught:
        await lane.run(lambda ticket: None)
    assert caught.value.retry_after_s
    gate.set()
    assert all(await asyncio.gather(*tasks))
    assert await lane.run(lambda ticket: 1) == 1


async def test_a_lane_that_stops_says_so() -> None:
    lane = Lane("test", 1, AttributionSettings())
    begun = threading.Event()

    def forever(ticket: Ticket) -> None:
        while True:
            begun.set()
            ticket(1, 2)

    task = asyncio.create_task(lane.run(forever))
    await asyncio.to_thread(begun.wait, 5)
    lane.stop()
    with pytest.raises(Unavailable):
        await task
