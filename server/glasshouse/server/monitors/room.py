"""The monitors of a server: in force as the registry has them, attached to requests, heard when they notice something.

1. `start` takes the latest version of every monitor of the models served out of the registry and compiles it: its probe
   or feature is found, its hook points are resolved, its edits checked. What cannot run here is kept as failed, says why,
   and is tried again from time to time.
2. Changes in the registry, by whichever server, arrive within a second (`RegistryWatch`); a model's roster is made anew,
   requests that run keep theirs. While the database is away nothing changes, and all goes on.
3. The engine's thread reports what crossed a threshold; on the event loop it becomes an event, and goes to listeners, to
   the registry's log, and to a webhook, each behind a bounded queue.
4. Scores are counted by a thread of their own (`statistics`), which also says when they drift.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import RequestWatch, Roster, Sighting, Watch
from glasshouse.server.monitors import storage
from glasshouse.server.monitors.events import MAX_TEXT, Event, EventBus, new_id, to_log
from glasshouse.server.monitors.recorder import EventRecorder
from glasshouse.server.monitors.running import (
    Monitor,
    Published,
    Rosters,
    State,
    compile_watch,
    new_statistics,
)
from glasshouse.server.monitors.secret_references import SecretReferences
from glasshouse.server.monitors.spec import EventKind, MonitorSpec, Subject, WebhookSpec
from glasshouse.server.monitors.statistics import Counter, DriftChange
from glasshouse.server.monitors.webhooks import DeliverySettings, Webhook, check_url
from glasshouse.server.probes.aggregation import Aggregation, Rule
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.names import Kind, Reference, check_name
from glasshouse.server.registry.records import Record
from glasshouse.server.registry.registry import Registry
from glasshouse.server.registry.watching import RegistryWatch
from glasshouse.server.types.conditions import MonitorAction, ProbeColumn
from glasshouse.server.types.configuration import MonitorSettings
from glasshouse.server.types.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    ServingError,
)
from glasshouse.wire import reasons

_log = structlog.get_logger(__name__)

RETRY_FAILED_S = 2.0
_REFRESH_TIMEOUT_S = 30.0
_PAGE = 1000


@dataclass(frozen=True, kw_only=True)
class MonitorCounts:
    """What the metrics page shows, besides what monitors hold themselves."""

    events: Mapping[tuple[str, str], int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    webhooks: Mapping[tuple[str, str], int] = field(default_factory=dict)


class MonitorRoom:
    """Every monitor of the models of `engines`. Lives on the event loop; `attach` is cheap enough for every request."""

    def __init__(
        self,
        library: ConceptLibrary,
        engines: Sequence[Engine],
        settings: MonitorSettings,
        secrets: Mapping[str, str],
    ) -> None:
        self._library = library
        self._engines = {engine.info.name: engine for engine in engines}
        self._settings = settings
        self._secrets = SecretReferences(secrets)
        self._server = settings.server_name or socket.gethostname()
        self._monitors: dict[str, dict[str, Monitor]] = {model: {} for model in self._engines}
        self._rosters = Rosters()
        self._bus = EventBus()
        self._events: Counts[tuple[str, str]] = Counts()
        self._deliveries: Counts[tuple[str, str]] = Counts()
        self._recorder: EventRecorder | None = None
        self._counter = Counter(self._count)
        self._refreshing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._watch: RegistryWatch | None = None
        self._retrying: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._stopped = False

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Puts what the registry holds into force. Without a registry there is nothing to do. Raises `Unavailable` where
        it does not answer.
        """
        if not self._library.has_registry:
            return
        counter = await asyncio.to_thread(self._registry.counter)
        await self.refresh()
        self._recorder = EventRecorder(
            self._registry.events,
            max_queued=self._settings.max_queued_events,
            retention_days=self._settings.retention_days,
            keep_at_most=self._settings.max_events_per_monitor,
        )
        self._recorder.start()
        self._counter.start()
        self._watch = RegistryWatch(self._registry, self._on_change, since=counter)
        self._watch.start()
        self._retrying = asyncio.create_task(self._retry_failed())

    async def stop(self) -> None:
        """Ends: listeners are told, events that are queued are written, as far as a few seconds go."""
        self._stopped = True
        if self._retrying is not None:
            self._retrying.cancel()
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
            await asyncio.to_thread(self._counter.stop)
        # What the threads handed over last.
        await asyncio.sleep(0)
        self._bus.close()
        hooks = [m.webhook for held in self._monitors.values() for m in held.values() if m.webhook]
        await asyncio.gather(*(hook.close(grace_s=1.0) for hook in hooks), *self._closing)
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.stop)

    @property
    def has_registry(self) -> bool:
        """Whether there is anything to keep monitors in."""
        return self._library.has_registry

    @property
    def away_since(self) -> datetime | None:
        """Since when the registry's database has not answered; None while it does."""
        since = None if self._watch is None else self._watch.unavailable_since_s
        return None if since is None else datetime.fromtimestamp(since, tz=UTC)

    # -- what is in force ----------------------------------------------------------------------------------------

    def _on_change(self, records: Sequence[Record]) -> None:
        """In the registry watch's thread. Raises what refreshing raises: then the change comes again."""
        if any(record.reference.kind in (Kind.MONITOR, Kind.PROBE) for record in records):
            asyncio.run_coroutine_threadsafe(self.refresh(), self._loop).result(_REFRESH_TIMEOUT_S)

    async def _retry_failed(self) -> None:
        while True:
            await asyncio.sleep(RETRY_FAILED_S)
            failed = any(m.state is State.FAILED for held in self._monitors.values() for m in held.values())
            if failed and self.away_since is None:
                try:
                    await self.refresh()
                except ServingError as error:
                    _log.warning("monitors_not_refreshed", message=error.message)

    async def refresh(self) -> None:
        """Brings what is in force up to the registry."""
        async with self._refreshing:
            for model in self._engines:
                latest = await asyncio.to_thread(self._latest, model)
                await self._put(model, latest)

    def _latest(self, model: str) -> dict[str, Record]:
        found: dict[str, Record] = {}
        token = ""
        while True:
            page = self._registry.list(Kind.MONITOR, model=model, page_size=_PAGE, page_token=token)
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
        reference = _reference(watch.name)
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
            published = await asyncio.to_thread(self._read, record)
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

    def _read(self, record: Record) -> Published:
        tensors = self._registry.tensors(record)
        return Published(
            reference=record.reference,
            spec=storage.spec_of(record.body, tensors, name=str(record.reference)),
            author=record.provenance.author,
            created=record.created,
        )

    def _open_webhook(self, spec: WebhookSpec, monitor: Monitor) -> Webhook:
        parts = check_url(spec.url, self._settings.webhook_hosts, "spec.webhook.url")
        self._secrets.read(spec.secret, field="spec.webhook.secret")
        name = monitor.published.name

        def tell(outcome: str) -> None:
            self._deliveries[name, outcome] += 1
            if outcome == "failed":
                monitor.statistics.n_webhook_failures += 1
            elif outcome == "dropped":
                monitor.statistics.n_dropped += 1

        return Webhook(
            spec,
            parts,
            lambda: self._secrets.read(spec.secret),
            tell,
            DeliverySettings(
                attempts=self._settings.webhook_attempts, timeout_s=self._settings.webhook_timeout_s
            ),
        )

    def all(self, model: str) -> list[Monitor]:
        """The monitors in force, by name."""
        held = self._monitors[model]
        return [held[name] for name in sorted(held)]

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

    def everywhere(self) -> list[Monitor]:
        """The monitors in force of every model, by name; from any thread."""
        held = [monitor for monitors in self._monitors.copy().values() for monitor in monitors.values()]
        return sorted(held, key=lambda monitor: monitor.published.name)

    def find(self, model: str, name: str) -> Monitor | None:
        """The one in force under a name."""
        return self._monitors[model].get(name)

    # -- publishing ----------------------------------------------------------------------------------------------

    async def check(self, model: str, spec: MonitorSpec) -> None:
        """Raises what keeps `spec` from running on this server."""
        spec.check()
        if spec.webhook is not None:
            check_url(spec.webhook.url, self._settings.webhook_hosts, "spec.webhook.url")
            self._secrets.read(spec.webhook.secret, field="spec.webhook.secret")
        await self.trial(model, spec)

    async def trial(self, model: str, spec: MonitorSpec) -> Watch:
        """The watch that `spec` would be. Raises what keeps it from running here."""
        reference = Reference(kind=Kind.MONITOR, model=model, name="trial", version=1)
        unpublished = Published(reference=reference, spec=spec, author="", created=datetime.now(tz=UTC))
        return await compile_watch(unpublished, self._engines[model])

    async def create(self, model: str, name: str, spec: MonitorSpec, author: str) -> Monitor:
        """Publishes a new monitor and puts it into force.

        Raises:
            AlreadyExists: there is one of this name; `metadata["next_version"]` is free.
            ResourceExhausted: the server runs as many as it may.
            Unavailable: the registry does not answer.
        """
        check_name(name, field="monitor")
        held = self._monitors[model]
        if name not in held and len(held) >= self._settings.max_monitors:
            raise ResourceExhausted(
                f"there are {len(held)} monitors, this server runs {self._settings.max_monitors}",
                reason=reasons.LIMIT_EXCEEDED,
                field="monitor",
                value=name,
                remedy="delete one that is not needed; the operator sets monitors.max_monitors",
            )
        await self.check(model, spec)
        try:
            return await self._publish(model, name, 1, spec, author)
        except AlreadyExists:
            # A name whose monitor was deleted is free again; its old versions' numbers are not.
            if await self._is_published(Reference(kind=Kind.MONITOR, model=model, name=name)):
                raise
        return await self._publish(model, name, None, spec, author)

    async def update(self, model: str, reference: Reference, spec: MonitorSpec, author: str) -> Monitor:
        """Publishes `spec` as the version after the one that `reference` names, and puts it into force.

        Raises:
            NotFound: there is no such monitor.
            FailedPrecondition: `reference` names a version that is not in force any more.
            AlreadyExists: somebody else has published a version meanwhile.
            Unavailable: the registry does not answer.
        """
        latest = replace(reference, version=None)
        record = await asyncio.to_thread(self._registry.get, latest)
        if reference.version != record.version:
            raise FailedPrecondition(
                f"{reference} is not in force any more, version {record.version} is",
                reason=reasons.VERSION_CHANGED,
                field="name",
                value=str(reference),
                remedy=f"look at version {record.version}, then update it",
                metadata={"version": str(record.version)},
            )
        # One that is switched off may be of something that is broken.
        if spec.enabled:
            await self.check(model, spec)
        else:
            spec.check()
        return await self._publish(model, reference.name, record.version + 1, spec, author)

    async def _publish(
        self, model: str, name: str, version: int | None, spec: MonitorSpec, author: str
    ) -> Monitor:
        draft = storage.draft(
            await self._pinned(model, spec),
            model=model,
            name=name,
            version=version,
            author=author,
            is_built_in=self._library.is_built_in,
        )
        record = await asyncio.to_thread(self._registry.publish, draft)
        await self.refresh()
        monitor = self._monitors[model].get(name)
        if monitor is None:
            raise NotFound(
                f"{record.reference} was deleted as soon as it was published",
                reason=reasons.RESOURCE_NOT_FOUND,
                resource_type="monitors",
                resource_name=str(record.reference),
            )
        return monitor

    async def _pinned(self, model: str, spec: MonitorSpec) -> MonitorSpec:
        """`spec` with the versions of what it names: what it means must not change under it."""
        concepts = self._engines[model].concepts
        source = spec.source
        if isinstance(source, ProbeColumn):
            held = await concepts.probe(source.probe, field="spec.probe.probe")
            source = replace(source, probe=held.name)
        edits = []
        for index, edit in enumerate(spec.interventions):
            names = {
                field: (await concepts.direction(name, field=f"spec.interventions[{index}]")).name
                for field, name in storage.named_directions(edit).items()
            }
            edits.append(storage.with_directions(edit, names) if names else edit)
        return replace(spec, source=source, interventions=tuple(edits))

    async def delete(self, model: str, name: str) -> None:
        """Deletes every version of a monitor. Raises as `Registry.delete`."""
        await asyncio.to_thread(self._registry.delete, Reference(kind=Kind.MONITOR, model=model, name=name))
        await self.refresh()

    async def published(self, reference: Reference) -> Published:
        """Any version, as it was published. Raises `NotFound`, `Unavailable`."""

        def read() -> Published:
            return self._read(self._registry.get(reference))

        return await asyncio.to_thread(read)

    async def _is_published(self, reference: Reference) -> bool:
        try:
            await self.published(reference)
        except NotFound:
            return False
        return True

    # -- requests ------------------------------------------------------------------------------------------------

    def attach(self, model: str, subject: Subject) -> RequestWatch | None:
        """What watches a request from its beginning; None where nothing does."""
        return self._rosters.attach(model, subject)

    def may_tell(self, asked: bool) -> bool:
        """Whether a request's text may be in events, of one whose caller has `asked` for or against it."""
        return asked and self._settings.text == "caller"

    def _report(self, sightings: Sequence[Sighting]) -> None:
        """In the engine's thread."""
        # The loop may be closed: nobody is left to listen.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take, sightings)

    def _take(self, sightings: Sequence[Sighting]) -> None:
        for seen in sightings:
            reference = _reference(seen.watch.name)
            monitor = self._monitors.get(reference.model, {}).get(reference.name)
            subject: Subject = seen.request.origin
            rule = seen.watch.rule
            off = rule.on_above if rule.off_below is None else rule.off_below
            now = datetime.now(tz=UTC)
            text = ""
            if seen.token_ids and subject.tell_text:
                engine = self._engines[reference.model]
                special = engine.info.special_token_ids
                said = [token for token in seen.token_ids if token not in special]
                text = engine.codec.decode(said)[-MAX_TEXT:]
            if monitor is not None and seen.raised:
                monitor.statistics.n_raised += 1
            self._publish_event(
                Event(
                    id=new_id(now),
                    monitor=reference,
                    kind=EventKind.RAISED if seen.raised else EventKind.CLEARED,
                    action=seen.watch.action,
                    time=now,
                    request_id=subject.request_id,
                    position=seen.position,
                    score=seen.score,
                    aggregate=seen.aggregate,
                    threshold=rule.on_above if seen.raised else off,
                    labels=subject.labels,
                    key=subject.key,
                    text=text,
                    server=self._server,
                ),
                monitor,
            )

    # -- events --------------------------------------------------------------------------------------------------

    def end_watches(self) -> None:
        """Ends every watch, and those that begin after it."""
        self._bus.close()

    @property
    def bus(self) -> EventBus:
        """Where events are listened to."""
        return self._bus

    @property
    def _registry(self) -> Registry:
        return self._library.registry

    @property
    def registry(self) -> Registry:
        """Where events and monitors are kept. Raises `FailedPrecondition` where the server has none."""
        return self._registry

    async def settled(self, timeout_s: float = 5.0) -> bool:
        """Waits until every event so far is in the registry's log; whether it was in time."""
        recorder = self._recorder
        return recorder is None or await asyncio.to_thread(recorder.flush, timeout_s)

    def _publish_event(self, event: Event, monitor: Monitor | None) -> None:
        if event.kind is EventKind.RAISED:
            self._events[event.monitor.name, event.action.value] += 1
        elif event.kind is EventKind.DRIFT:
            self._events[event.monitor.name, "drift"] += 1
        self._bus.publish(event)
        dropped = self._recorder is not None and self._recorder.add(to_log(event))
        if monitor is not None:
            monitor.statistics.n_dropped += dropped
            if monitor.webhook is not None:
                monitor.webhook.offer(event)

    def _count(self) -> None:
        """In the counting thread."""
        changes = self._rosters.count()
        if changes and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take_drift, changes)

    def _take_drift(self, changes: Sequence[tuple[Monitor, DriftChange]]) -> None:
        for monitor, (_, drift, moved) in changes:
            now = datetime.now(tz=UTC)
            event = Event(
                id=new_id(now),
                monitor=monitor.published.reference,
                kind=EventKind.DRIFT if moved else EventKind.DRIFT_CLEARED,
                action=MonitorAction.OBSERVE,
                time=now,
                drift=drift,
                server=self._server,
            )
            self._publish_event(event, monitor)

    def counts(self) -> MonitorCounts:
        """For the metrics page; from any thread."""
        return MonitorCounts(
            events=dict(self._events.copy()),
            dropped={
                "registry": 0 if self._recorder is None else self._recorder.n_dropped,
                "watch": self._bus.n_dropped,
            },
            webhooks=dict(self._deliveries.copy()),
        )


def _reference(name: str) -> Reference:
    _, model, _, rest = name.split("/", 3)
    short, _, version = rest.partition("@")
    return Reference(kind=Kind.MONITOR, model=model, name=short, version=int(version))


# Stands for what a newer server wrote.
_UNREADABLE = MonitorSpec(
    source=ProbeColumn(probe=""), rule=Rule(aggregation=Aggregation.MAX, on_above=0.0), enabled=False
)
