"""The monitors of a server: in force as the registry has them, attached to requests, heard when they notice something.

1. `start` puts what the registry holds into force (`in_force`); more comes as it is published (`publishing`).
2. Changes in the registry, by whichever server, arrive within a second (`RegistryWatch`). While the database is away
   nothing changes, and all goes on.
3. What monitors notice is heard (`hearing`): by listeners, in the registry's log, through webhooks.
4. Scores are counted by a thread of their own (`statistics`), which also says when they drift.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import structlog

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import RequestWatch
from glasshouse.server.monitors.hearing import Hearing
from glasshouse.server.monitors.in_force import InForce
from glasshouse.server.monitors.publishing import Publisher
from glasshouse.server.monitors.recorder import EventRecorder
from glasshouse.server.monitors.secret_references import SecretReferences
from glasshouse.server.monitors.spec import Subject
from glasshouse.server.monitors.statistics import Counter
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Record
from glasshouse.server.registry.registry import Registry
from glasshouse.server.registry.watching import RegistryWatch
from glasshouse.server.types.configuration import MonitorSettings
from glasshouse.server.types.errors import ServingError

_log = structlog.get_logger(__name__)

RETRY_FAILED_S = 2.0
_REFRESH_TIMEOUT_S = 30.0


class MonitorRoom:
    """Every monitor of the models of `engines`: `in_force`, `publisher` and `hearing`, begun and ended together. Lives on
    the event loop; `attach` is cheap enough for every request.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        engines: Sequence[Engine],
        settings: MonitorSettings,
        secrets: Mapping[str, str],
    ) -> None:
        self._library = library
        self._settings = settings
        by_name = {engine.info.name: engine for engine in engines}
        references = SecretReferences(secrets)
        self.hearing = Hearing(by_name, settings.server_name or socket.gethostname())
        self.in_force = InForce(library, by_name, settings, references, self.hearing)
        self.publisher = Publisher(library, by_name, settings, references, self.in_force)
        self._counter = Counter(self.in_force.count)
        self._loop = asyncio.get_running_loop()
        self._watch: RegistryWatch | None = None
        self._retrying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Puts what the registry holds into force. Without a registry there is nothing to do. Raises `Unavailable` where
        it does not answer.
        """
        if not self._library.has_registry:
            return
        counter = await asyncio.to_thread(self.registry.counter)
        await self.in_force.refresh()
        self.hearing.record(
            EventRecorder(
                self.registry.events,
                max_queued=self._settings.max_queued_events,
                retention_days=self._settings.retention_days,
                keep_at_most=self._settings.max_events_per_monitor,
            )
        )
        self._counter.start()
        self._watch = RegistryWatch(self.registry, self._on_change, since=counter)
        self._watch.start()
        self._retrying = asyncio.create_task(self._retry_failed())

    async def stop(self) -> None:
        """Ends: listeners are told, events that are queued are written, as far as a few seconds go."""
        self.in_force.end()
        if self._retrying is not None:
            self._retrying.cancel()
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
            await asyncio.to_thread(self._counter.stop)
        # What the threads handed over last.
        await asyncio.sleep(0)
        self.hearing.bus.close()
        await self.in_force.close()
        await asyncio.to_thread(self.hearing.stop_recording)

    def end_watches(self) -> None:
        """Ends every watch, and those that begin after it."""
        self.hearing.bus.close()

    @property
    def has_registry(self) -> bool:
        """Whether there is anything to keep monitors in."""
        return self._library.has_registry

    @property
    def registry(self) -> Registry:
        """Where events and monitors are kept. Raises `FailedPrecondition` where the server has none."""
        return self._library.registry

    @property
    def away_since(self) -> datetime | None:
        """Since when the registry's database has not answered; None while it does."""
        since = None if self._watch is None else self._watch.unavailable_since_s
        return None if since is None else datetime.fromtimestamp(since, tz=UTC)

    def attach(self, model: str, subject: Subject) -> RequestWatch | None:
        """What watches a request from its beginning; None where nothing does."""
        return self.in_force.attach(model, subject)

    def may_tell(self, asked: bool) -> bool:
        """Whether a request's text may be in events, of one whose caller has `asked` for or against it."""
        return asked and self._settings.text == "caller"

    def _on_change(self, records: Sequence[Record]) -> None:
        """In the registry watch's thread. Raises what refreshing raises: then the change comes again."""
        if any(record.reference.kind in (Kind.MONITOR, Kind.PROBE) for record in records):
            refreshed = asyncio.run_coroutine_threadsafe(self.in_force.refresh(), self._loop)
            refreshed.result(_REFRESH_TIMEOUT_S)

    async def _retry_failed(self) -> None:
        while True:
            await asyncio.sleep(RETRY_FAILED_S)
            if self.in_force.any_failed and self.away_since is None:
                try:
                    await self.in_force.refresh()
                except ServingError as error:
                    _log.warning("monitors_not_refreshed", message=error.message)
