"""MonitorService's calls, for both transports."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from glasshouse.client.calls import Method, StreamCall, UnaryCall
from glasshouse.client.exceptions import DeadlineExceededError, GlasshouseError, UnavailableError
from glasshouse.client.monitors import builders, parsers
from glasshouse.client.monitors.values import MonitorEvent
from glasshouse.client.parsers import Page
from glasshouse.client.scalars import text
from glasshouse.v1 import monitors_pb2 as pb

_SERVICE: Final = "/glasshouse.v1.MonitorService/"
CREATE: Final = Method(_SERVICE + "CreateMonitor", pb.CreateMonitorResponse)
UPDATE: Final = Method(_SERVICE + "UpdateMonitor", pb.UpdateMonitorResponse)
GET: Final = Method(_SERVICE + "GetMonitor", pb.GetMonitorResponse)
LIST: Final = Method(_SERVICE + "ListMonitors", pb.ListMonitorsResponse)
DELETE: Final = Method(_SERVICE + "DeleteMonitor", pb.DeleteMonitorResponse)
WATCH: Final = Method(_SERVICE + "WatchMonitor", pb.WatchMonitorResponse)
EVENTS: Final = Method(_SERVICE + "ListMonitorEvents", pb.ListMonitorEventsResponse)

# A watch is a call that is taken up again when its time is over; servers cut deadlines to a bound of theirs.
WATCH_TIMEOUT_S: Final = 3600.0
RECONNECT_S: Final = 0.5


def create(model: str, name: str, parts: Mapping[str, Any]) -> UnaryCall[pb.Monitor]:
    """A new monitor."""
    request = builders.create(model, name, builders.spec(**parts))
    return UnaryCall(CREATE, request, lambda response: response.monitor)


def update(name: str, changes: Mapping[str, Any], before: pb.MonitorSpec) -> UnaryCall[pb.Monitor]:
    """The next version of one."""
    request = builders.update(name, changes, parsers.arguments(before))
    return UnaryCall(UPDATE, request, lambda response: response.monitor)


def get(model: str, name: str) -> UnaryCall[pb.Monitor]:
    """One monitor by its short name, or in full."""
    named = text(name, "name")
    full = named if named.startswith("models/") else f"{model}/monitors/{named}"
    return UnaryCall(GET, pb.GetMonitorRequest(name=full), lambda response: response.monitor)


def list_monitors(model: str, page_token: str) -> UnaryCall[Page[pb.Monitor]]:
    """A page of the monitors in force."""
    return UnaryCall(LIST, pb.ListMonitorsRequest(model=model, page_token=page_token), parsers.monitor_page)


def delete(name: str) -> UnaryCall[None]:
    """Every version of one."""
    return UnaryCall(DELETE, pb.DeleteMonitorRequest(name=name), lambda _: None)


def events(
    name: str, since: datetime | None, page_size: int, page_token: str
) -> UnaryCall[Page[MonitorEvent]]:
    """A page of stored events."""
    return UnaryCall(EVENTS, builders.events(name, since, page_size, page_token), parsers.event_page)


@dataclass
class WatchState:
    """A watch without its transport: what to ask for when it begins, and begins again."""

    name: str
    model: str
    after_event: str
    since: datetime | None
    kinds: tuple[str, ...]
    n_dropped: int = 0

    def __post_init__(self) -> None:
        self.pending: deque[MonitorEvent] = deque()
        self.begun = False

    def call(self) -> StreamCall:
        """The call that goes on from here."""
        request = builders.watch(self.name, self.model, self.after_event, self.since, self.kinds)
        return StreamCall(WATCH, request)

    def feed(self, message: pb.WatchMonitorResponse) -> None:
        """Takes in a message."""
        if message.start and not self.begun:
            self.begun = True
            # One from the past is asked for again as it was, until an event says how far it got.
            if self.since is None:
                self.after_event = message.start
        self.n_dropped += message.events_dropped
        for one in message.events:
            self.pending.append(parsers.event(one))
            self.after_event = max(self.after_event, one.id)

    def goes_on_after(self, error: GlasshouseError) -> bool:
        """Whether the watch is taken up again: the call's time was over, or the server is away for a moment."""
        return self.begun and isinstance(error, DeadlineExceededError | UnavailableError)


def watch(name: str, model: str, after: Any, since: datetime | None, kinds: Iterable[str]) -> WatchState:
    """A watch that has not begun. `after`: an event, or the id of one."""
    after_event = after.id if isinstance(after, MonitorEvent) else text(after or "", "after")
    return WatchState(name, model, after_event, since, tuple(kinds))
