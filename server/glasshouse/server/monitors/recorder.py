"""Events into the registry's log: a bounded queue, one thread, one short transaction a batch.

- While the database does not answer, events wait; when the queue is full the oldest are dropped and counted.
- Retention runs in the same thread: what is older than an age, and beyond a number a monitor the oldest.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from datetime import UTC, datetime, timedelta

import structlog

from glasshouse.server.registry.events import EventLog, MonitorEvent
from glasshouse.server.types.errors import ServingError, Unavailable

_log = structlog.get_logger(__name__)

BATCH = 500
FLUSH_INTERVAL_S = 0.2
RETRY_S = 0.5
PURGE_INTERVAL_S = 600.0


class EventRecorder:
    """Writes events in batches from a thread of its own."""

    def __init__(
        self,
        log: EventLog,
        *,
        max_queued: int,
        retention_days: float,
        keep_at_most: int,
        purge_interval_s: float = PURGE_INTERVAL_S,
    ) -> None:
        self._events = log
        self._max_queued = max_queued
        self._retention = timedelta(days=retention_days)
        self._keep_at_most = keep_at_most
        self._purge_interval_s = purge_interval_s
        self._queue: deque[MonitorEvent] = deque()
        self._news = threading.Condition()
        self._busy = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="monitor-events", daemon=True)
        self.n_written = 0
        self.n_dropped = 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def add(self, event: MonitorEvent) -> bool:
        """Queues an event; never blocks. Whether one was dropped for it."""
        with self._news:
            full = len(self._queue) >= self._max_queued
            if full:
                self._queue.popleft()
                self.n_dropped += 1
            self._queue.append(event)
            self._news.notify()
        return full

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything queued so far is written; whether it was in time."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while (self._queue or self._busy) and (left := deadline - time.monotonic()) > 0:
                self._news.wait(min(left, 0.05))
            return not (self._queue or self._busy)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Writes what is queued, as far as the time goes, and ends."""
        self.flush(timeout_s)
        with self._news:
            self._stopping = True
            self._news.notify()
        self._thread.join(timeout_s)
        if self._queue:
            _log.warning("monitor_events_lost", n=len(self._queue))

    def _run(self) -> None:
        purged = time.monotonic() - self._purge_interval_s
        while True:
            with self._news:
                self._news.wait_for(lambda: self._queue or self._stopping, timeout=1.0)
                if self._stopping:
                    return
                batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                self._busy = bool(batch)
            if batch:
                written = self._write(batch)
                with self._news:
                    if not written:
                        room = max(0, self._max_queued - len(self._queue))
                        self.n_dropped += max(0, len(batch) - room)
                        self._queue.extendleft(reversed(batch[-room:] if room else []))
                    self._busy = False
                    self._news.notify_all()
                    if not written:
                        self._news.wait_for(lambda: self._stopping, timeout=RETRY_S)
                        continue
            if time.monotonic() - purged >= self._purge_interval_s:
                purged = time.monotonic()
                self._purge()
            with self._news:
                if len(self._queue) < BATCH:
                    # Events come in bursts: one transaction for each costs more than they do.
                    self._news.wait_for(lambda: self._stopping, timeout=FLUSH_INTERVAL_S)

    def _write(self, batch: list[MonitorEvent]) -> bool:
        """Whether it is over with the batch."""
        try:
            self._events.append(batch)
        except Unavailable:
            return False
        except Exception:
            # Not the database's absence: trying again would fail again.
            _log.exception("monitor_events_not_written", n=len(batch))
            self.n_dropped += len(batch)
            return True
        self.n_written += len(batch)
        return True

    def _purge(self) -> None:
        try:
            gone = self._events.purge(
                older_than=datetime.now(tz=UTC) - self._retention, keep_at_most=self._keep_at_most
            )
            if gone:
                _log.info("monitor_events_purged", n=gone)
        except ServingError as error:
            _log.warning("monitor_events_not_purged", message=error.message)
