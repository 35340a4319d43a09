"""The monitors that are in force, as the registry has them.

1. Of every monitor of the models served the latest version is taken out of the registry and compiled: its probe or feature
   is found, its hook points are resolved, its edits checked. What cannot run here is kept as failed, says why, and is
   tried again from time to time.
2. Where anything changed, a model's roster is made anew; requests that run keep theirs.
3. A monitor that cannot do what it is for any more fails alone; of a roster that met a defect nobody knows whose it was,
   and all of it fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import structlog

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import RequestWatch, Roster, Sighting, Watch
from glasshouse.server.monitors import storage
from glasshouse.server.monitors.hearing import Hearing, reference_of
from glasshouse.server.monitors.running import (
    Monitor,
    Published,
    Rosters,
    State,
    compile_watch,
    new_statistics,
)
from glasshouse.server.monitors.secret_references import SecretReferences
from glasshouse.server.monitors.spec import MonitorSpec, Subject, WebhookSpec
from glasshouse.server.monitors.webhooks import DeliverySettings, Webhook, check_url
from glasshouse.server.probes.aggregation import Aggregation, Rule
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import Record
from glasshouse.server.types.conditions import ProbeColumn
from glasshouse.server.types.configuration import MonitorSettings
from glasshouse.server.types.errors import FailedPrecondition, Internal, ServingError
from glasshouse.wire import reasons

_log = structlog.get_logger(__name__)

_PAGE = 1000

# Stands for what a newer server wrote.
_UNREADABLE = MonitorSpec(
    source=ProbeColumn(probe=""), rule=Rule(aggregation=Aggregation.MAX, on_above=0.0), enabled=False
)


class InForce:
    """Every monitor of the models of `engines`. Lives on the event loop; `attach` is cheap enough for every request."""

    def __init__(
        self,
        library: ConceptLibrary,
        engines: Mapping[str, Engine],
        settings: MonitorSettings,
        secrets: SecretReferences,
        hearing: Hearing,
    ) -> None:
        self._library = library
        self._engines = engines
        self._settings = settings
        self._secrets = secrets
        self._hearing = hearing
        self._monitors: dict[str, dict[str, Monitor]] = {model: {} for model in engines}
        self._rosters = Rosters()
        self._refreshing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._closing: set[asyncio.Task[None]] = set()
        self._stopped = False

    def all(self, model: str) -> list[Monitor]:
        """The monitors in force, by name."""
        held = self._monitors[model]
        return [held[name] for name in sorted(held)]

    def find(self, model: str, name: str) -> Monitor | None:
        """The one in force under a name."""
        return self._monitors[model].get(name)

    def everywhere(self) -> list[Monitor]:
        """The monitors in force of every model, by name; from any thread."""
        held = [monitor for monitors in self._monitors.copy().values() for monitor in monitors.values()]
        return sorted(held, key=lambda monitor: monitor.published.name)

    def check_unused(self, model: str, dictionary: str) -> None:
        """Raises `FailedPrecondition` where a monitor that runs scores or steers with a dictionary."""
        users = [
            str(monitor.published.reference)
            for monitor in self.all(model)
            if monitor.watch is not None and dictionary in storage.dictionaries_of(monitor.published.spec)
        ]
        if users:
            raise FailedPrecondition(
                f"dictionary {dictionary} is used by {', '.join(users[:5])}",
                reason=reasons.IN_USE,
                field="name",
                value=dictionary,
                remedy="disable or delete what uses it first",
                metadata={"used_by": ", ".join(users[:20])},
            )

    def attach(self, model: str, subject: Subject) -> RequestWatch | None:
        """What watches a request from its beginning; None where nothing does."""
        return self._rosters.attach(model, subject)

    def count(self) -> None:
        """Counts what was scored, and tells of what has drifted. In the counting thread."""
        self._hearing.report_drift(self._rosters.count())

    @property
    def any_failed(self) -> bool:
        """Whether there is one to try again."""
        return any(m.state is State.FAILED for held in self._monitors.values() for m in held.values())

    async def refresh(self) -> None:
        """Brings what is in force up to the registry."""
        async with self._refreshing:
            for model in self._engines:
                latest = await asyncio.to_thread(self._latest, model)
                await self._put(model, latest)

    def read(self, record: Record) -> Published:
        """What a record says. Blocks. Raises what reading its tensors raises."""
        tensors = self._library.registry.tensors(record)
        return Published(
            reference=record.reference,
            spec=storage.spec_of(record.body, tensors, name=str(record.reference)),
            author=record.provenance.author,
            created=record.created,
        )

    def end(self) -> None:
        """Nothing comes into force any more."""
        self._stopped = True

    async def close(self) -> None:
        """Ends the webhooks, once the last events have been offered to them."""
        hooks = [m.webhook for held in self._monitors.values() for m in held.values() if m.webhook]
        await asyncio.gather(*(hook.close(grace_s=1.0) for hook in hooks), *self._closing)

    def _latest(self, model: str) -> dict[str, Record]:
        found: dict[str, Record] = {}
        token = ""
        while True:
            page = self._library.registry.list(Kind.MONITOR, model=model, page_size=_PAGE, page_token=token)
            found.update((record.reference.name, record) for record in page.records)
            token = page.next_page_token
            if not token:
                return found

    async def _put(self, model: str, latest: Mapping[str, Record]) -> None:
        held = self._monitors[model]
        made: dict[str, Monitor] = {}
        for name, record in latest.items():
            old = held.get(name)
            same = old is not None and old.published.reference == record.reference
            if old is not None and same and old.state is not State.FAILED:
                made[name] = old
                continue
            monitor = await self._compile(model, record)
            if old is not None and same and monitor.state is State.FAILED:
                monitor = old
            made[name] = monitor
        if self._stopped or (made.keys() == held.keys() and all(made[name] is held[name] for name in made)):
            return
        gone = [monitor for name, monitor in held.items() if made.get(name) is not monitor]
        self._monitors[model] = made
        self._put_roster(model)
        for monitor in gone:
            self._close(monitor)

    def _put_roster(self, model: str) -> None:
        running = [monitor for monitor in self.all(model) if monitor.watch is not None]
        self._rosters.put(model, running, self._report, self._fail, self._break)

    def _report(self, sightings: Sequence[Sighting]) -> None:
        """In the engine's thread."""
        self._hearing.report(sightings, self._named)

    def _named(self, reference: Reference) -> Monitor | None:
        return self._monitors.get(reference.model, {}).get(reference.name)

    def _break(self, roster: Roster, error: Exception) -> None:
        """In the engine's thread: a roster met a defect. Which of its monitors it was is not known."""
        _log.error("monitors_broken", exc_info=error)
        failure = Internal(
            f"it met a defect ({type(error).__name__}); the server's log has it",
            reason=reasons.DEFECT,
            remedy="report it",
        )

        def give_up() -> None:
            for watch in roster.watches:
                self._fail(watch, failure)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(give_up)

    def _fail(self, watch: Watch, error: ServingError) -> None:
        """A monitor that ran cannot do what it is for any more."""
        reference = reference_of(watch)
        monitor = self._monitors[reference.model].get(reference.name)
        if monitor is None or monitor.watch is not watch:
            return
        _log.warning("monitor_failed", monitor=watch.name, message=error.message)
        monitor.state, monitor.reason, monitor.watch = State.FAILED, error.message, None
        self._put_roster(reference.model)

    def _close(self, monitor: Monitor) -> None:
        if monitor.webhook is not None:
            # Events that are on their way are delivered, by whoever's version they are.
            closing = asyncio.create_task(monitor.webhook.close(grace_s=30.0))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _compile(self, model: str, record: Record) -> Monitor:
        """The monitor of a record, as it can run here."""
        try:
            published = await asyncio.to_thread(self.read, record)
        except ServingError as error:
            unread = Published(
                reference=record.reference,
                spec=_UNREADABLE,
                author=record.provenance.author,
                created=record.created,
            )
            return Monitor(published=unread, state=State.FAILED, reason=error.message)
        spec = published.spec
        statistics = new_statistics(spec)
        if not spec.enabled:
            return Monitor(published=published, state=State.DISABLED, statistics=statistics)
        n_running = sum(m.watch is not None for m in self._monitors[model].values())
        if n_running >= self._settings.max_monitors and record.reference.name not in self._monitors[model]:
            reason = f"this server runs {self._settings.max_monitors} monitors (limit: monitors.max_monitors)"
            return Monitor(published=published, state=State.FAILED, reason=reason, statistics=statistics)
        try:
            watch = await compile_watch(published, self._engines[model])
        except ServingError as error:
            _log.warning("monitor_failed", monitor=str(published.reference), message=error.message)
            return Monitor(
                published=published, state=State.FAILED, reason=error.message, statistics=statistics
            )
        made = Monitor(published=published, state=State.RUNNING, watch=watch, statistics=statistics)
        if spec.webhook is not None:
            try:
                made.webhook = self._open_webhook(spec.webhook, made)
            except ServingError as error:
                # It watches all the same: a webhook is one of several ways to be heard.
                made.reason = f"its webhook is off: {error.message}"
        return made

    def _open_webhook(self, spec: WebhookSpec, monitor: Monitor) -> Webhook:
        parts = check_url(spec.url, self._settings.webhook_hosts, "spec.webhook.url")
        self._secrets.read(spec.secret, field="spec.webhook.secret")
        return Webhook(
            spec,
            parts,
            lambda: self._secrets.read(spec.secret),
            lambda outcome: self._hearing.count_delivery(monitor, outcome),
            DeliverySettings(
                attempts=self._settings.webhook_attempts, timeout_s=self._settings.webhook_timeout_s
            ),
        )
