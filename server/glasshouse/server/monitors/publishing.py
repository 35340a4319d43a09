"""New monitors and new versions of them: checked, published to the registry, put into force."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.watching import Watch
from glasshouse.server.monitors import storage
from glasshouse.server.monitors.in_force import InForce
from glasshouse.server.monitors.running import Monitor, Published, compile_watch
from glasshouse.server.monitors.secret_references import SecretReferences
from glasshouse.server.monitors.spec import MonitorSpec
from glasshouse.server.monitors.webhooks import check_url
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.names import Kind, Reference, check_name
from glasshouse.server.types.conditions import ProbeColumn
from glasshouse.server.types.configuration import MonitorSettings
from glasshouse.server.types.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted
from glasshouse.wire import reasons


class Publisher:
    """Publishes what is to be in force, and takes it back. Lives on the event loop."""

    def __init__(
        self,
        library: ConceptLibrary,
        engines: Mapping[str, Engine],
        settings: MonitorSettings,
        secrets: SecretReferences,
        in_force: InForce,
    ) -> None:
        self._library = library
        self._engines = engines
        self._settings = settings
        self._secrets = secrets
        self._in_force = in_force

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
        held = self._in_force.all(model)
        if self._in_force.find(model, name) is None and len(held) >= self._settings.max_monitors:
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
        record = await asyncio.to_thread(self._library.registry.get, latest)
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

    async def delete(self, model: str, name: str) -> None:
        """Deletes every version of a monitor. Raises as `Registry.delete`."""
        await asyncio.to_thread(
            self._library.registry.delete, Reference(kind=Kind.MONITOR, model=model, name=name)
        )
        await self._in_force.refresh()

    async def published(self, reference: Reference) -> Published:
        """Any version, as it was published. Raises `NotFound`, `Unavailable`."""

        def read() -> Published:
            return self._in_force.read(self._library.registry.get(reference))

        return await asyncio.to_thread(read)

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
        record = await asyncio.to_thread(self._library.registry.publish, draft)
        await self._in_force.refresh()
        monitor = self._in_force.find(model, name)
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

    async def _is_published(self, reference: Reference) -> bool:
        try:
            await self.published(reference)
        except NotFound:
            return False
        return True
