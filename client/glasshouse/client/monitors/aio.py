"""`AsyncMonitor`, `AsyncMonitorWatch`, and a model's methods that make and find monitors, awaited. `sync` is its twin."""

# A timeout here is a gRPC deadline, which the server sees too: asyncio.timeout would not tell it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any

from glasshouse.client.aio_transport import AsyncMessageStream, AsyncTransport
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


class AsyncMonitorWatch:
    """`MonitorWatch` for asyncio: `async with monitor.watch() as watch: async for event in watch`. On when the block is
    entered.
    """

    def __init__(self, transport: AsyncTransport, state: calls.WatchState) -> None:
        self._transport = transport
        self._state = state
        self._closed = False
        self._messages: AsyncMessageStream | None = None

    async def __aenter__(self) -> AsyncMonitorWatch:
        if self._messages is None:
            self._messages = await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[MonitorEvent]:
        return self

    async def __anext__(self) -> MonitorEvent:
        pending = self._state.pending
        while not pending:
            if self._closed:
                raise StopAsyncIteration
            if self._messages is None:
                self._messages = await self._begin()
            else:
                await self._read(self._messages)
        return pending.popleft()

    @property
    def n_dropped(self) -> int:
        """Events that were dropped because this reader was behind."""
        return self._state.n_dropped

    def close(self) -> None:
        """Stops watching."""
        self._closed = True
        if self._messages is not None:
            self._messages.cancel()

    async def _begin(self) -> AsyncMessageStream:
        messages = self._transport.stream(self._state.call(), calls.WATCH_TIMEOUT_S)
        first = await messages.read()
        if first is not None:
            self._state.feed(first)
        return messages

    async def _read(self, messages: AsyncMessageStream) -> None:
        try:
            message = await messages.read()
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
        await asyncio.sleep(calls.RECONNECT_S)
        if not self._closed:
            self._messages = await self._begin()


class AsyncMonitor(MonitorView):
    """`Monitor` for asyncio: the same names and arguments, awaited."""

    _transport: AsyncTransport

    async def refresh(self, *, timeout: float | None = None) -> AsyncMonitor:
        """Asks after the version that is in force now; returns itself."""
        self._take(await self._transport.unary(calls.get("", self._unversioned), timeout))
        return self

    async def update(self, *, timeout: float | None = None, **changes: Any) -> AsyncMonitor:
        """Changes it: publishes its next version, with the arguments of `create_monitor` that are given, and puts it into
        force. Raises FailedPreconditionError where somebody else has changed it since; returns itself.
        """
        call = calls.update(self.resource_name, changes, self._message.spec)
        self._take(await self._transport.unary(call, timeout))
        return self

    async def enable(self, *, timeout: float | None = None) -> AsyncMonitor:
        """Lets it watch again."""
        return await self.update(enabled=True, timeout=timeout)

    async def disable(self, *, timeout: float | None = None) -> AsyncMonitor:
        """Lets it rest; nothing of it is lost."""
        return await self.update(enabled=False, timeout=timeout)

    async def delete(self, *, timeout: float | None = None) -> None:
        """Deletes it with all its versions."""
        await self._transport.unary(calls.delete(self._unversioned), timeout)

    def watch(
        self,
        *,
        after: MonitorEvent | str | None = None,
        since: datetime | None = None,
        kinds: Sequence[EventKind] = (),
    ) -> AsyncMonitorWatch:
        """Its events from now on, of every version; or first those that the registry keeps after an event or a time."""
        return AsyncMonitorWatch(self._transport, calls.watch(self._unversioned, "", after, since, kinds))

    async def events(
        self, *, since: datetime | None = None, limit: int = 100, timeout: float | None = None
    ) -> list[MonitorEvent]:
        """The newest events that the registry keeps, newest first, of every server."""
        found: list[MonitorEvent] = []
        pages = partial(calls.events, self._unversioned, since, min(limit, 1000))
        async for event in self._transport.items(pages, timeout):
            if len(found) == limit:
                break
            found.append(event)
        return found


class AsyncMonitorMethods:
    """What an `AsyncModel` does with monitors. All of it needs the admin role."""

    _transport: AsyncTransport
    _name: str

    async def monitors(self, *, timeout: float | None = None) -> list[AsyncMonitor]:
        """The monitors in force, by name, as they run on the server that is asked."""
        pages = partial(calls.list_monitors, self._name)
        return [
            AsyncMonitor(self._transport, message) async for message in self._transport.items(pages, timeout)
        ]

    async def monitor(self, name: str, *, timeout: float | None = None) -> AsyncMonitor:
        """One monitor: `name` as it is in force, or any `name@version`. Raises NotFoundError with the closest names."""
        return AsyncMonitor(
            self._transport, await self._transport.unary(calls.get(self._name, name), timeout)
        )

    async def create_monitor(
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
    ) -> AsyncMonitor:
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
        return AsyncMonitor(self._transport, await self._transport.unary(call, timeout))

    def watch_monitors(
        self,
        *,
        after: MonitorEvent | str | None = None,
        since: datetime | None = None,
        kinds: Sequence[EventKind] = (),
    ) -> AsyncMonitorWatch:
        """The events of every monitor of the model; as `AsyncMonitor.watch`."""
        return AsyncMonitorWatch(self._transport, calls.watch("", self._name, after, since, kinds))
