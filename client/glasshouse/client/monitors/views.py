"""What a handle shows of a monitor: shared by the sync and the async handles."""

from __future__ import annotations

from typing import Any

from glasshouse.client.monitors import parsers
from glasshouse.client.monitors.values import MonitorCounts, MonitorInfo, State
from glasshouse.v1 import monitors_pb2 as pb


class MonitorView:
    """A monitor as it was when it was last asked after; `refresh` asks again."""

    def __init__(self, transport: Any, message: pb.Monitor) -> None:
        self._transport = transport
        self._take(message)

    def _take(self, message: pb.Monitor) -> None:
        self._message = message
        self.info: MonitorInfo = parsers.monitor(message)

    def __repr__(self) -> str:
        info = self.info
        return f"{type(self).__name__}({info.name}@{info.version}, {info.action}, {info.state})"

    @property
    def name(self) -> str:
        """Its short name."""
        return self.info.name

    @property
    def version(self) -> int:
        """The version it is of."""
        return self.info.version

    @property
    def resource_name(self) -> str:
        """`models/{model}/monitors/{name}@{version}`."""
        return self.info.resource_name

    @property
    def state(self) -> State:
        """Whether it works on the server that was asked; `info.state_reason` says why not."""
        return self.info.state

    @property
    def counts(self) -> MonitorCounts:
        """What it has done on the server that was asked."""
        return self.info.counts

    @property
    def _unversioned(self) -> str:
        return self.info.resource_name.partition("@")[0]
