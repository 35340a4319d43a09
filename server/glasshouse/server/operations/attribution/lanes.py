"""Lanes: threads that explain while the engine generates.

1. Work is a function of a `Ticket`; it tells the ticket how far it is (`attribution.progress`), which is also where it
   stands back for generation and, once its caller has left, stops: within one batch of its own.
2. A lane has a few threads and a bounded queue; beyond it work is refused at once. Each thread computes on its own
   number of CPU threads, and where the system allows it below the priority of everything else in the process.
3. What a thread makes of a model with hooks (`twin`) is its own: two passes never meet in one module.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

import structlog
import torch

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.engines.engine import Engine
from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import ResourceExhausted, Unavailable
from glasshouse.wire import reasons

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class Stopped(BaseException):
    """Raised inside work whose caller has left. No handler of ordinary errors swallows it."""


class Ticket:
    """One piece of work, as it goes. It is a `Progress`: call it with (done, total)."""

    def __init__(self, told: Callable[[int, int], None] | None = None) -> None:
        self._told = told
        self._stopped = threading.Event()
        self._engine: Engine | None = None
        self._last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        self.check()
        if self._told is not None:
            self._told(done, total)
        self._stand_back()

    def check(self) -> None:
        """Raises `Stopped` where the caller has left."""
        if self._stopped.is_set():
            raise Stopped

    def stop(self) -> None:
        """The caller has left."""
        self._stopped.set()

    def beside(self, engine: Engine) -> None:
        """Says which engine's generation this work stands back for."""
        self._engine = engine

    def _stand_back(self) -> None:
        """While tokens are generated, rests as long as the last batch took."""
        now = time.perf_counter()
        if self._engine is not None and self._engine.status().running:
            self._stopped.wait(now - self._last)
            self.check()
        self._last = time.perf_counter()


Work = Callable[[Ticket], T]


class Twins:
    """The gradient models of one thread, by engine."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def of(self, engine: Engine) -> GradientModel:
        """This thread's own. Raises FailedPrecondition where the engine has no gradients."""
        known: WeakKeyDictionary[Engine, GradientModel] | None = getattr(self._of_thread, "known", None)
        if known is None:
            known = self._of_thread.known = WeakKeyDictionary()
        if engine not in known:
            known[engine] = GradientModel(engine.gradient_twin())
        return known[engine]


class Lane:
    """`n_threads` threads with a queue of at most `max_queued`. Made and used within one event loop."""

    def __init__(self, name: str, n_threads: int, settings: AttributionSettings) -> None:
        self._name, self._n_threads, self._settings = name, n_threads, settings
        self._pending = 0
        self._tickets: set[Ticket] = set()
        self._pool = ThreadPoolExecutor(n_threads, f"glasshouse-{name}", self._begin_thread)

    async def run(self, work: Work[T], ticket: Ticket | None = None) -> T:
        """What `work` returns. Leaving early stops it."""
        ticket = ticket or Ticket()
        self._admit()
        loop = asyncio.get_running_loop()
        self._tickets.add(ticket)
        try:
            return await loop.run_in_executor(self._pool, self._in_thread, work, ticket)
        except asyncio.CancelledError:
            ticket.stop()
            raise
        except Stopped:
            raise _stopped() from None
        finally:
            self._tickets.discard(ticket)
            self._pending -= 1

    async def iterate(self, work: Work[Iterator[T]], ticket: Ticket | None = None) -> AsyncGenerator[T, None]:
        """What `work` yields, each item when it is asked for. Others take turns between two items, so that a long
        iteration holds up nobody, and one whose reader is slow takes no turns. Of a lane of one thread: that is where
        the iterator lives.
        """
        assert self._n_threads == 1
        ticket = ticket or Ticket()
        self._admit()
        loop = asyncio.get_running_loop()
        self._tickets.add(ticket)
        try:
            items = await loop.run_in_executor(self._pool, self._in_thread, work, ticket)
            while (item := await loop.run_in_executor(self._pool, _next, items, ticket)) is not None:
                yield item[0]
        except Stopped:
            raise _stopped() from None
        finally:
            ticket.stop()
            self._tickets.discard(ticket)
            self._pending -= 1

    def stop(self) -> None:
        """Stops what runs, within its batch; what waits is dropped."""
        for ticket in self._tickets:
            ticket.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _in_thread(self, work: Work[T], ticket: Ticket) -> T:
        ticket.check()
        return work(ticket)

    def _admit(self) -> None:
        most = self._n_threads + self._settings.max_queued
        if self._pending >= most:
            raise ResourceExhausted(
                f"{self._pending} attributions run or wait already, {most} may",
                reason=reasons.QUEUE_FULL,
                value=self._pending,
                remedy="try again in a moment",
                retry_after_s=1.0,
                metadata={"limit": str(most), "setting": "attribution.max_queued"},
            )
        self._pending += 1

    def _begin_thread(self) -> None:
        torch.set_num_threads(self._settings.threads)
        if sys.platform == "linux" and self._settings.niceness:
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._settings.niceness)
            except OSError as error:
                _log.info("attribution_priority", lane=self._name, error=str(error))


def _next(items: Iterator[T], ticket: Ticket) -> tuple[T] | None:
    """The next item, boxed; None at the end."""
    ticket.check()
    for item in items:
        return (item,)
    return None


def _stopped() -> Unavailable:
    return Unavailable(
        "the server is stopping", reason=reasons.SERVER_DRAINING, remedy="try again once it is back"
    )


class Lanes:
    """The two lanes of a server: calls, whose callers wait, and operations."""

    def __init__(self, settings: AttributionSettings) -> None:
        self.twins = Twins()
        self.calls = Lane("calls", 1, settings)
        self.operations = Lane("operations", settings.max_running, settings)

    def stop(self) -> None:
        """Stops both."""
        self.calls.stop()
        self.operations.stop()
