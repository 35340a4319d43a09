"""MonitorService of a fake server: requests in, responses out, no transport.

A monitor scores a prompt by the share of vowels among its letters, as the fake probes do, and is on where that is above its
threshold: flags and events follow a generation at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from glasshouse.client.testing.failures import invalid, refused
from glasshouse.client.testing.fake_model import FakeModel
from glasshouse.client.testing.fake_services import PAGE
from glasshouse.v1 import conditions_pb2, generation_pb2
from glasshouse.v1 import monitors_pb2 as pb
from glasshouse.wire import reasons

_VOWELS = frozenset("aeiouAEIOU")


class FakeMonitorServices:
    """What each method answers. `_kept`: every version, by name; an empty list is of one that was deleted."""

    def __init__(self, model: Callable[..., FakeModel]) -> None:
        self._model_of = model
        self._kept: dict[str, list[pb.Monitor]] = {}
        self._events: list[pb.MonitorEvent] = []
        self._news = threading.Condition()

    # -- MonitorService ------------------------------------------------------------------------------------------

    def create_monitor(self, request: pb.CreateMonitorRequest) -> pb.CreateMonitorResponse:
        """A first version."""
        model = self._model_of(request.model).name
        if not request.monitor:
            raise invalid("monitor", "monitor is required", reasons.FIELD_REQUIRED, "Give it a name")
        if request.spec.WhichOneof("score") is None:
            raise invalid("spec.score", "a score is required", reasons.FIELD_REQUIRED, "Name a probe")
        if not request.spec.threshold.HasField("on_above"):
            raise invalid("spec.threshold.on_above", "a threshold is required", reasons.FIELD_REQUIRED)
        if self._kept.get(request.monitor):
            following = str(len(self._kept[request.monitor]) + 1)
            raise refused(
                "ALREADY_EXISTS",
                f"{request.monitor} is taken",
                reason=reasons.NAME_TAKEN,
                field="monitor",
                next_version=following,
            )
        return pb.CreateMonitorResponse(monitor=self._put(model, request.monitor, request.spec))

    def update_monitor(self, request: pb.UpdateMonitorRequest) -> pb.UpdateMonitorResponse:
        """The next version."""
        latest = self._find(request.name)
        spec = pb.MonitorSpec()
        spec.CopyFrom(latest.spec)
        for path in request.update_mask.paths:
            spec.ClearField(path)  # type: ignore[arg-type]
            if request.spec.HasField(path) or path in ("interventions", "action"):  # type: ignore[arg-type]
                part = pb.MonitorSpec()
                part.CopyFrom(request.spec)
                for field in pb.MonitorSpec.DESCRIPTOR.fields:
                    if field.name != path:
                        part.ClearField(field.name)  # type: ignore[arg-type]
                spec.MergeFrom(part)
        _, model, _, name = latest.name.split("/")
        return pb.UpdateMonitorResponse(monitor=self._put(model, name.partition("@")[0], spec))

    def get_monitor(self, request: pb.GetMonitorRequest) -> pb.GetMonitorResponse:
        """One version."""
        return pb.GetMonitorResponse(monitor=self._find(request.name))

    def list_monitors(self, request: pb.ListMonitorsRequest) -> pb.ListMonitorsResponse:
        """A page of the latest versions."""
        self._model_of(request.model)
        found = [versions[-1] for _, versions in sorted(self._kept.items()) if versions]
        start = int(request.page_token or 0)
        token = str(start + PAGE) if start + PAGE < len(found) else ""
        return pb.ListMonitorsResponse(monitors=found[start : start + PAGE], next_page_token=token)

    def delete_monitor(self, request: pb.DeleteMonitorRequest) -> pb.DeleteMonitorResponse:
        """Every version."""
        self._find(request.name)
        self._kept[_short(request.name)] = []
        return pb.DeleteMonitorResponse()

    def watch_monitor(self, request: pb.WatchMonitorRequest) -> Iterator[pb.WatchMonitorResponse]:
        """Events until the caller leaves."""
        with self._news:
            seen = 0 if request.after_event or request.HasField("since") else len(self._events)
        yield pb.WatchMonitorResponse(start=request.after_event or f"{seen:016x}-{'0' * 12}")
        while True:
            with self._news:
                if len(self._events) == seen:
                    self._news.wait(0.05)
                found, seen = self._events[seen:], len(self._events)
            wanted = [event for event in found if self._wanted(event, request)]
            # An empty message lets the server notice that the caller has left.
            yield pb.WatchMonitorResponse(events=wanted)

    @staticmethod
    def _wanted(event: pb.MonitorEvent, request: pb.WatchMonitorRequest) -> bool:
        same = not request.name or _short(event.monitor) == _short(request.name)
        return same and event.id > request.after_event and (not request.kinds or event.kind in request.kinds)

    def list_monitor_events(self, request: pb.ListMonitorEventsRequest) -> pb.ListMonitorEventsResponse:
        """A page of events, newest first."""
        found = [event for event in reversed(self._events) if _short(event.monitor) == _short(request.name)]
        start, size = int(request.page_token or 0), min(request.page_size or PAGE, PAGE)
        token = str(start + size) if start + size < len(found) else ""
        return pb.ListMonitorEventsResponse(events=found[start : start + size], next_page_token=token)

    # -- generations ---------------------------------------------------------------------------------------------

    def flags(self, request: generation_pb2.GenerateRequest) -> list[conditions_pb2.MonitorFlag]:
        """What the monitors in force say of a generation's prompt; each notes an event."""
        text = request.input.text
        letters = [letter for letter in text if letter.isalpha()]
        score = sum(letter in _VOWELS for letter in letters) / max(1, len(letters))
        flags = []
        for versions in self._kept.values():
            if not versions:
                continue
            monitor = versions[-1]
            spec = monitor.spec
            enabled = not spec.HasField("enabled") or spec.enabled
            if not enabled or score <= spec.threshold.on_above:
                continue
            position = max(0, len(text) - 1)
            self._note(monitor, spec, score, position, request)
            if spec.action not in (
                conditions_pb2.MONITOR_ACTION_UNSPECIFIED,
                conditions_pb2.MONITOR_ACTION_OBSERVE,
            ):
                flag = conditions_pb2.MonitorFlag(
                    monitor=monitor.name,
                    position=position,
                    score=score,
                    threshold=spec.threshold.on_above,
                    action=spec.action,
                )
                flags.append(flag)
        return flags

    def _note(
        self,
        monitor: pb.Monitor,
        spec: pb.MonitorSpec,
        score: float,
        position: int,
        request: generation_pb2.GenerateRequest,
    ) -> None:
        told = spec.include_text and request.allow_text_in_events
        event = pb.MonitorEvent(
            monitor=monitor.name,
            kind=pb.MONITOR_EVENT_KIND_RAISED,
            action=spec.action or conditions_pb2.MONITOR_ACTION_OBSERVE,
            position=position,
            score=score,
            aggregate=score,
            threshold=spec.threshold.on_above,
            labels=dict(request.labels),
            text=request.input.text if told else "",
            server="fake",
        )
        event.time.FromDatetime(datetime.now(tz=UTC))
        with self._news:
            event.id = f"{len(self._events) + 1:016x}-{'0' * 12}"
            self._events.append(event)
            monitor.counts.raised += 1
            self._news.notify_all()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _put(self, model: str, name: str, spec: pb.MonitorSpec) -> pb.Monitor:
        versions = self._kept.setdefault(name, [])
        enabled = not spec.HasField("enabled") or spec.enabled
        version = len(versions) + 1
        monitor = pb.Monitor(
            name=f"models/{model}/monitors/{name}@{version}",
            version=version,
            spec=spec,
            state=pb.MONITOR_STATE_RUNNING if enabled else pb.MONITOR_STATE_DISABLED,
        )
        monitor.create_time.FromDatetime(datetime.now(tz=UTC))
        versions.append(monitor)
        return monitor

    def _find(self, name: str) -> pb.Monitor:
        short, _, version = name.rpartition("/")[2].partition("@")
        versions = self._kept.get(short, [])
        if not versions or (version and int(version) > len(versions)):
            raise refused(
                "NOT_FOUND",
                f"there is no monitor {name}",
                reason=reasons.RESOURCE_NOT_FOUND,
                field="name",
                value=name,
                closest=tuple(sorted(self._kept)),
            )
        return versions[int(version) - 1] if version else versions[-1]


def _short(name: str) -> str:
    return name.rpartition("/")[2].partition("@")[0]
