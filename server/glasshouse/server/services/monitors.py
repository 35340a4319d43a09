"""MonitorService: monitors published, changed and deleted, and what they notice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime

from google.protobuf import timestamp_pb2

from glasshouse.server.monitors.calibration import calibrate
from glasshouse.server.monitors.events import Event, from_log, new_id, time_of
from glasshouse.server.monitors.room import MonitorRoom
from glasshouse.server.monitors.running import Monitor
from glasshouse.server.monitors.spec import DriftSpec, MonitorSpec
from glasshouse.server.registry.names import Kind, Reference, parse
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import monitors_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .call import Call
from .catalogue import Catalogue, ServedModel
from .inputs import InputReader
from .monitor_messages import event_message, monitor_message, published_message
from .monitor_specs import FIELDS, DriftWish, event_kinds, spec_from, spec_message
from .pages import page

_DEFAULT_EVENTS, _MOST_EVENTS = 100, 1000
_MOST_REPLAYED = 10_000
# Events of one message of a watch.
_BATCH = 100


class MonitorServicer:
    """Serves `glasshouse.v1.MonitorService`."""

    def __init__(self, catalogue: Catalogue, limits: Limits, room: MonitorRoom) -> None:
        self._catalogue = catalogue
        self._limits = limits
        self._room = room

    async def CreateMonitor(self, request: pb.CreateMonitorRequest, call: Call) -> pb.CreateMonitorResponse:
        """Publishes a monitor."""
        model = self._catalogue.find(request.model, "model")
        if not request.monitor:
            raise fields.required("monitor", "what it is called", "give it a name")
        if not request.HasField("spec"):
            raise fields.required("spec", "what it is", "send a MonitorSpec")
        spec = await self._spec(request.spec, model)
        monitor = await self._room.publisher.create(
            model.engine.info.name, request.monitor, spec, call.caller
        )
        return pb.CreateMonitorResponse(monitor=self._message(monitor))

    async def UpdateMonitor(self, request: pb.UpdateMonitorRequest, call: Call) -> pb.UpdateMonitorResponse:
        """Publishes the next version."""
        model, reference = self._named(request.name)
        paths = list(request.update_mask.paths)
        if not paths:
            raise fields.required(
                "update_mask", "which fields to change", f"name some of: {', '.join(sorted(FIELDS))}"
            )
        for index, path in enumerate(paths):
            if path not in FIELDS:
                raise fields.out_of_range(
                    f"update_mask.paths[{index}]", repr(path), f"one of: {', '.join(sorted(FIELDS))}"
                )
        latest = await self._room.publisher.published(replace(reference, version=None))
        merged = _merged(spec_message(latest.spec), request.spec, paths)
        spec = await self._spec(merged, model)
        # Whoever comes between is noticed by the version's number.
        based_on = replace(reference, version=reference.version or latest.reference.version)
        monitor = await self._room.publisher.update(model.engine.info.name, based_on, spec, call.caller)
        return pb.UpdateMonitorResponse(monitor=self._message(monitor))

    async def GetMonitor(self, request: pb.GetMonitorRequest, call: Call) -> pb.GetMonitorResponse:
        """The version in force as it runs here; any other as it was published."""
        model, reference = self._named(request.name)
        monitor = self._room.in_force.find(model.engine.info.name, reference.name)
        if monitor is not None and reference.version in (None, monitor.published.reference.version):
            return pb.GetMonitorResponse(monitor=self._message(monitor))
        return pb.GetMonitorResponse(
            monitor=published_message(await self._room.publisher.published(reference))
        )

    async def ListMonitors(self, request: pb.ListMonitorsRequest, call: Call) -> pb.ListMonitorsResponse:
        """What is in force, from memory."""
        model = self._catalogue.find(request.model, "model")
        shown, token = page(
            self._room.in_force.all(model.engine.info.name),
            page_size=request.page_size,
            page_token=request.page_token,
            default=50,
            most=1000,
        )
        response = pb.ListMonitorsResponse(
            monitors=[self._message(monitor) for monitor in shown], next_page_token=token
        )
        if (since := self._room.away_since) is not None:
            response.registry_away_since.FromDatetime(since)
        return response

    async def DeleteMonitor(self, request: pb.DeleteMonitorRequest, call: Call) -> pb.DeleteMonitorResponse:
        """Deletes every version."""
        model, reference = self._named(request.name)
        if reference.version is not None:
            raise InvalidArgument(
                f"{request.name!r:.200} is one version; a monitor is deleted with all of them",
                reason=reasons.VALUE_MALFORMED,
                field="name",
                value=request.name,
                remedy=f"delete {reference.name!r}, or update it: the next version replaces this one",
            )
        await self._room.publisher.delete(model.engine.info.name, reference.name)
        return pb.DeleteMonitorResponse()

    async def WatchMonitor(
        self, request: pb.WatchMonitorRequest, call: Call
    ) -> AsyncIterator[pb.WatchMonitorResponse]:
        """Events as they come. Ends when the server stops."""
        model, reference = self._watched(request)
        kinds = event_kinds(list(request.kinds), "kinds")
        since = _start(request)

        def wanted(event: Event) -> bool:
            return _is_of(event, model.engine.info.name, reference) and (not kinds or event.kind in kinds)

        subscription = self._room.hearing.bus.subscribe(wanted)
        try:
            yield pb.WatchMonitorResponse(start=request.after_event or new_id(datetime.now(tz=UTC)))
            seen: set[str] = set()
            if since is not None:
                past, n_older = await self._past(model, reference, since)
                past = [event for event in past if event.id > request.after_event and wanted(event)]
                seen = {event.id for event in past}
                for message in _messages(past, n_older):
                    yield message
            while not subscription.closed:
                await subscription.wait()
                events, n_dropped = subscription.take()
                # What the log and the subscription both have.
                events = [event for event in events if event.id not in seen]
                for message in _messages(events, n_dropped):
                    yield message
        finally:
            self._room.hearing.bus.unsubscribe(subscription)

    async def ListMonitorEvents(
        self, request: pb.ListMonitorEventsRequest, call: Call
    ) -> pb.ListMonitorEventsResponse:
        """Events of the registry."""
        _, reference = self._named(request.name)
        if request.page_size < 0:
            raise fields.out_of_range("page_size", request.page_size, "0 or more; 0 takes the default")
        size = min(request.page_size or _DEFAULT_EVENTS, _MOST_EVENTS)
        before = _cursor(request.page_token)
        since = _time(request.since, "since") if request.HasField("since") else None
        log = self._room.registry.events
        found = await asyncio.to_thread(
            log.read, reference, since=since, before_id=before, limit=min(size + 1, _MOST_EVENTS)
        )
        shown = found[:size]
        events = [event for kept in shown if (event := from_log(kept)) is not None]
        more = len(found) > size or len(found) == _MOST_EVENTS
        return pb.ListMonitorEventsResponse(
            events=[event_message(event) for event in events],
            next_page_token=f"before:{shown[-1].id}" if more else "",
        )

    # -- parts ---------------------------------------------------------------------------------------------------

    async def _spec(self, message: pb.MonitorSpec, model: ServedModel) -> MonitorSpec:
        spec, wish = spec_from(message, self._limits)
        if wish is None:
            return spec
        return replace(spec, drift=await self._drift(spec, wish, model))

    async def _drift(self, spec: MonitorSpec, wish: DriftWish, model: ServedModel) -> DriftSpec:
        """The drift that is wished for, its texts scored."""
        if not wish.inputs:
            return wish.settings
        field = "spec.drift.calibration_inputs"
        inputs = await InputReader(model, self._limits).prompts(wish.inputs, field)
        for index, tokens in enumerate(inputs):
            InputReader(model, self._limits).check_fits(len(tokens), 1, f"{field}[{index}]")
        watch = await self._room.publisher.trial(model.engine.info.name, spec)
        histogram = await calibrate(watch, model.engine, inputs, field=field)
        return replace(wish.settings, calibration=histogram)

    def _watched(self, request: pb.WatchMonitorRequest) -> tuple[ServedModel, Reference | None]:
        if request.name:
            return self._named(request.name, model=request.model)
        return self._catalogue.find(request.model, "model"), None

    async def _past(
        self, model: ServedModel, reference: Reference | None, since: datetime
    ) -> tuple[list[Event], int]:
        """The newest events of the registry since then, oldest first, and how many older ones are left out."""
        await self._room.hearing.settled()
        references = (
            [reference]
            if reference is not None
            else [monitor.published.reference for monitor in self._room.in_force.all(model.engine.info.name)]
        )
        log = self._room.registry.events

        def read() -> tuple[list[Event], int]:
            kept: list[Event] = []
            n_older = 0
            for one in references:
                whole = replace(one, version=None) if reference is None else one
                before: int | None = None
                while True:
                    found = log.read(whole, since=since, before_id=before, limit=_MOST_EVENTS)
                    room = max(0, _MOST_REPLAYED - len(kept))
                    kept += [event for row in found[:room] if (event := from_log(row)) is not None]
                    n_older += max(0, len(found) - room)
                    if len(found) < _MOST_EVENTS:
                        break
                    before = found[-1].id
            return sorted(kept, key=lambda event: event.id), n_older

        return await asyncio.to_thread(read)

    def _named(self, name: str, field: str = "name", model: str = "") -> tuple[ServedModel, Reference]:
        """The monitor that a request names, and its model."""
        if not name:
            raise fields.required(field, "which monitor", "give its name")
        in_full = name.split("/")[1] if name.startswith("models/") and name.count("/") == 3 else model
        served = self._catalogue.find(in_full, field)
        return served, parse(name, kind=Kind.MONITOR, model=served.engine.info.name, field=field)

    def _message(self, monitor: Monitor) -> pb.Monitor:
        since = self._room.away_since
        note = "" if since is None else f"the registry has not answered since {since:%Y-%m-%dT%H:%M:%SZ}"
        return monitor_message(monitor, note)


def _merged(before: pb.MonitorSpec, changes: pb.MonitorSpec, paths: list[str]) -> pb.MonitorSpec:
    """`before` with the fields in `paths` as they are in `changes`, where one that is not set is its default."""
    merged = pb.MonitorSpec()
    merged.CopyFrom(before)
    fields_of = {"score": ("probe", "feature")}
    for name in (name for path in paths for name in fields_of.get(path, (path,))):
        merged.ClearField(name)  # type: ignore[arg-type]
        part = pb.MonitorSpec()
        part.CopyFrom(changes)
        for field in pb.MonitorSpec.DESCRIPTOR.fields:
            if field.name != name:
                part.ClearField(field.name)  # type: ignore[arg-type]
        merged.MergeFrom(part)
    return merged


def _is_of(event: Event, model: str, reference: Reference | None) -> bool:
    if event.model != model:
        return False
    if reference is None:
        return True
    same_version = reference.version in (None, event.monitor.version)
    return event.monitor.name == reference.name and same_version


def _messages(events: list[Event], n_dropped: int) -> Iterator[pb.WatchMonitorResponse]:
    for start in range(0, max(len(events), n_dropped > 0), _BATCH):
        yield pb.WatchMonitorResponse(
            events=[event_message(event) for event in events[start : start + _BATCH]],
            events_dropped=0 if start else n_dropped,
        )


def _start(request: pb.WatchMonitorRequest) -> datetime | None:
    match request.WhichOneof("start"):
        case "after_event":
            time = time_of(request.after_event)
            if time is None:
                raise InvalidArgument(
                    f"{request.after_event!r:.100} is not the id of an event",
                    reason=reasons.VALUE_MALFORMED,
                    field="after_event",
                    value=request.after_event,
                    remedy="send an event's id, unchanged",
                )
            return time
        case "since":
            return _time(request.since, "since")
        case _:
            return None


def _time(message: timestamp_pb2.Timestamp, field: str) -> datetime:
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise fields.out_of_range(field, message.seconds, "a time between the years 1 and 9999") from None


def _cursor(token: str) -> int | None:
    if not token:
        return None
    name, colon, number = token.partition(":")
    if name != "before" or not colon or not number.isascii() or not number.isdigit() or len(number) > 18:
        raise InvalidArgument(
            "page_token is not one that this list gave out",
            reason=reasons.VALUE_MALFORMED,
            field="page_token",
            value=token,
            remedy="send next_page_token of the page before, unchanged, or nothing for the first page",
        )
    return int(number)
