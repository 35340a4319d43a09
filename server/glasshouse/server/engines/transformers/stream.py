"""Events from the engine's thread to the caller's event loop: bounded, paced, and told when the caller is gone.

1. The engine's thread puts events into a stream. Nothing blocks there.
2. Once a step it hands over what every stream has, in one call on each loop.
3. On the loop a batch waits for its reader. A reader too far behind ends its own stream, and nobody else's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Generic, TypeVar

from glasshouse.server.types.errors import ResourceExhausted, Unavailable
from glasshouse.wire import reasons

T = TypeVar("T")


class EventStream(Generic[T]):
    """One request's events. `cancelled` is set by the reader's side and read by the engine's."""

    def __init__(self, *, max_events: int, max_bytes: int, wake_engine: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_events, self._max_bytes = max_events, max_bytes
        self._wake_engine = wake_engine
        # The engine's side.
        self._outgoing: list[T] = []
        self._ended = False
        self._put_events = self._put_bytes = self._outgoing_bytes = 0
        # The reader's side.
        self._ready: list[T] = []
        self._ready_bytes = 0
        self._error: BaseException | None = None
        self._done = False
        self._waiter: asyncio.Future[None] | None = None
        self._read_events = self._read_bytes = 0
        self.cancelled = threading.Event()

    # -- the engine's side ---------------------------------------------------------------------------------------

    def put(self, event: T, n_bytes: int = 0) -> None:
        """Adds an event; ends the stream with ResourceExhausted if its reader is too far behind."""
        if self._ended:
            return
        self._outgoing.append(event)
        self._outgoing_bytes += n_bytes
        self._put_events += 1
        self._put_bytes += n_bytes
        if self._put_events - self._read_events > self._max_events or self.backlog_bytes > self._max_bytes:
            self.fail(
                ResourceExhausted(
                    f"the reader is {self._put_events - self._read_events} events behind",
                    reason=reasons.SLOW_CONSUMER,
                    remedy="read the stream faster, or ask for fewer readouts",
                )
            )

    @property
    def backlog_bytes(self) -> int:
        """Bytes put and not yet read."""
        return self._put_bytes - self._read_bytes

    @property
    def ended(self) -> bool:
        """Whether the last event has been put."""
        return self._ended

    def end(self) -> None:
        """No more events."""
        self._ended = True

    def fail(self, error: BaseException) -> None:
        """Ends the stream with `error`, after the events already put."""
        if not self._ended:
            self._error = error
            self.end()

    def take(self) -> tuple[asyncio.AbstractEventLoop, Callable[[], None]] | None:
        """What is there, as a call to be made on the loop."""
        if not self._outgoing and not self._ended:
            return None
        events, n_bytes, ended = self._outgoing, self._outgoing_bytes, self._ended
        self._outgoing, self._outgoing_bytes = [], 0
        return self._loop, lambda: self._receive(events, n_bytes, ended)

    # -- the reader's side ---------------------------------------------------------------------------------------

    def _receive(self, events: list[T], n_bytes: int, ended: bool) -> None:
        self._ready.extend(events)
        self._ready_bytes += n_bytes
        self._done = self._done or ended
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def batches(self) -> AsyncGenerator[Sequence[T], None]:
        """Events as they come, several at once where the reader is behind. Leaving early cancels the request."""
        try:
            while True:
                if self._ready:
                    events, self._ready = self._ready, []
                    n_bytes, self._ready_bytes = self._ready_bytes, 0
                    self._read_events += len(events)
                    yield events
                    # Counted when the reader comes back for more: by then it has sent them on.
                    self._read_bytes += n_bytes
                    if n_bytes:
                        self._wake_engine()
                    continue
                if self._done:
                    if self._error is not None:
                        raise self._error
                    return
                self._waiter = self._loop.create_future()
                await self._waiter
                self._waiter = None
        finally:
            self.cancelled.set()
            self._wake_engine()


def hand_over(streams: Sequence[EventStream[Any]]) -> set[EventStream[Any]]:
    """Hands over what the streams hold; returns those that have ended. One wake-up a loop."""
    calls: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    over = set()
    for stream in streams:
        taken = stream.take()
        if taken is not None:
            calls.setdefault(taken[0], []).append(taken[1])
        if stream.ended or stream.cancelled.is_set():
            over.add(stream)
    for loop, loop_calls in calls.items():
        try:
            loop.call_soon_threadsafe(_run_all, loop_calls)
        except RuntimeError:  # the loop is closed: its readers are gone
            continue
    return over


def _run_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def unavailable(reason: str) -> Unavailable:
    """What a stream ends with when the engine stops."""
    return Unavailable(
        reason, reason=reasons.ENGINE_STOPPED, remedy="try again when the server is back", retry_after_s=5.0
    )
