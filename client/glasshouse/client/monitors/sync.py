"""`Monitor`, `MonitorWatch`, and a model's methods that make and find monitors, with blocking calls. `aio` is its twin."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any

from glasshouse.client.concepts.views import ProbeView
from glasshouse.client.dictionaries.names import DictionaryLike
from glasshouse.client.exceptions import CancelledError, GlasshouseError
from glasshouse.client.inputs import InputLike
from glasshouse.client.interventions import Intervention
from glasshouse.client.monitors import calls
from glasshouse.client.monitors.values import (
    Action,
    Aggregation,
    DriftLimits,
    EventKind,
    MonitorEvent,
    ScoreHistogram,
    Webhook,
)
from glasshouse.client.monitors.views import MonitorView
from glasshouse.client.positions import PositionsLike
from glasshouse.client.sync_transport import MessageStream, Transport


class MonitorWatch:
    """Events as they happen: iterate, leave the block to stop. On when it is made: what happens after is not missed.

    Taken up again by itself where it breaks off, from the last event on. `n_dropped`: events that this reader was too
    slow for, so far.
    """

    def __init__(self, transport: Transport, state: calls.WatchState) -> None:
        self._transport = transport
        self._state = state
        self._closed = False
        self._messages: MessageStream = self._begin()

    def __enter__(self) -> MonitorWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[MonitorEvent]:
        return self

    def __next__(self) -> MonitorEvent:
        pending = self._state.pending
        while not pending:
            if self._closed:
                raise StopIteration
            self._read()
        return pending.popleft()

    @property
    def n_dropped(self) -> int:
        """Events that were dropped because this reader was behind."""
        return self._state.n_dropped

    def close(self) -> None:
        """Stops watching; from any thread."""
        self._closed = True
        self._messages.cancel()

    def _begin(self) -> MessageStream:
        messages = self._transport.stream(self._state.call(), calls.WATCH_TIMEOUT_S)
        first = messages.read()
        if first is not None:
            self._state.feed(first)
        return messages

    def _read(self) -> None:
        try:
            message = self._messages.read()
            if message is not None:
                self._state.feed(message)
                return
        except CancelledError:
            if not self._closed:
                raise
            return
        except GlasshouseError as error:
            if not self._state.goes_on_after(error):
                raise
        # Its time was over, or the server has gone for a while.
        time.sleep(calls.RECONNECT_S)
        if not self._closed:
            self._messages = self._begin()


class Monitor(MonitorView):
    """A monitor. Made by `model.create_monitor` and `model.monitor`."""

    _transport: Transport

    def refresh(self, *, timeout: float | None = None) -> Monitor:
        """Asks after the version that is in force now; returns itself."""
        self._take(self._transport.unary(calls.get("", self._unversioned), timeout))
        return self

    def update(self, *, timeout: float | None = None, **changes: Any) -> Monitor:
        """Changes it: publishes its next version, with the arguments of `create_monitor` that are given, and puts it into
        force. Raises FailedPreconditionError where somebody else has changed it since; returns itself.
        """
        call = calls.update(self.resource_name, changes, self._message.spec)
        self._take(self._transport.unary(call, timeout))
        return self

    def enable(self, *, timeout: float | None = None) -> Monitor:
        """Lets it watch again."""
        return self.update(enabled=True, timeout=timeout)

    def disable(self, *, timeout: float | None = None) -> Monitor:
        """Lets it rest; nothing of it is lost."""
        return self.update(enabled=False, timeout=timeout)

    def delete(self, *, timeout: float | None = None) -> None:
        """Deletes it with all its versions."""
        self._transport.unary(calls.delete(self._unversioned), timeout)

    def watch(
        self,
        *,
        after: MonitorEvent | str | None = None,
        since: datetime | None = None,
        kinds: Sequence[EventKind] = (),
    ) -> MonitorWatch:
        """Its events from now on, of every version; or first those that the registry keeps after an event or a time."""
        return MonitorWatch(self._transport, calls.watch(self._unversioned, "", after, since, kinds))

    def events(
        self, *, since: datetime | None = None, limit: int = 100, timeout: float | None = None
    ) -> list[MonitorEvent]:
        """The newest events that the registry keeps, newest first, of every server."""
        found: list[MonitorEvent] = []
        pages = partial(calls.events, self._unversioned, since, min(limit, 1000))
        for event in self._transport.items(pages, timeout):
            if len(found) == limit:
                break
            found.append(event)
        return found


class MonitorMethods:
    """What a `Model` does with monitors. All of it needs the admin role."""

    _transport: Transport
    _name: str

    def monitors(self, *, timeout: float | None = None) -> list[Monitor]:
        """The monitors in force, by name, as they run on the server that is asked."""
        pages = partial(calls.list_monitors, self._name)
        return [Monitor(self._transport, message) for message in self._transport.items(pages, timeout)]

    def monitor(self, name: str, *, timeout: float | None = None) -> Monitor:
        """One monitor: `name` as it is in force, or any `name@version`. Raises NotFoundError with the closest names."""
        return Monitor(self._transport, self._transport.unary(calls.get(self._name, name), timeout))

    def create_monitor(
        self,
        name: str,
        *,
        probe: ProbeView | str | None = None,
        label: str = "",
        feature: tuple[DictionaryLike, int] | None = None,
        above: float,
        clear_below: float | None = None,
        min_tokens: int | None = None,
        aggregation: Aggregation = "max",
        weight: float | None = None,
        level: float | None = None,
        positions: PositionsLike | None = None,
        action: Action = "observe",
        interventions: Sequence[Intervention] = (),
        steer_while_on: bool = False,
        keys: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        sampling_rate: float | None = None,
        calibration: Sequence[InputLike] | ScoreHistogram | None = None,
        drift_limits: DriftLimits | None = None,
        webhook: Webhook | None = None,
        include_text: bool = False,
        enabled: bool = True,
        description: str = "",
        timeout: float | None = None,
    ) -> Monitor:
        """Publishes a monitor and puts it into force, here at once and on the registry's other servers within a second.

        A `probe` (with a `label` where it has several) or a `feature`, (dictionary, index), is scored at `positions`
        (`all()`, `prompt()` or `generated()`; default all but special tokens) of every generation that has these
        `labels` and one of these `keys`, or of a share of them. The scores of a request so far are made one number,
        "max", "mean", "exponential" (of this `weight`) or "fraction_above" (this `level`); where it goes `above`, the
        monitor is on, until it falls below `clear_below`. Then it "observe"s, "flag"s the response, "steer"s with
        `interventions` from then on, or "abort"s the stream. `calibration` texts are what scores should look like:
        events say when they drift. Raises AlreadyExistsError where the name is taken.
        """
        parts = {
            "probe": probe,
            "label": label,
            "feature": feature,
            "above": above,
            "clear_below": clear_below,
            "min_tokens": min_tokens,
            "aggregation": aggregation,
            "weight": weight,
            "level": level,
            "positions": positions,
            "action": action,
            "interventions": interventions,
            "steer_while_on": steer_while_on,
            "keys": keys,
            "labels": labels,
            "sampling_rate": sampling_rate,
            "calibration": calibration,
            "drift_limits": drift_limits,
            "webhook": webhook,
            "include_text": include_text,
            "enabled": enabled,
            "description": description,
        }
        call = calls.create(self._name, name, parts)
        return Monitor(self._transport, self._transport.unary(call, timeout))

    def watch_monitors(
        self,
        *,
        after: MonitorEvent | str | None = None,
        since: datetime | None = None,
        kinds: Sequence[EventKind] = (),
    ) -> MonitorWatch:
        """The events of every monitor of the model; as `Monitor.watch`."""
        return MonitorWatch(self._transport, calls.watch("", self._name, after, since, kinds))
