"""`AsyncOperation`: long work at the server, awaited. `sync_operation` is its twin."""

# A timeout here is a gRPC deadline, which the server sees too: asyncio.timeout would not tell it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from glasshouse.client import calls
from glasshouse.client.aio_transport import AsyncTransport
from glasshouse.client.operations import OperationProgress, OperationView, Polls

T = TypeVar("T")


class AsyncOperation(OperationView[T]):
    """`Operation` for asyncio: the same names and arguments, awaited."""

    _transport: AsyncTransport

    async def done(self, *, timeout: float | None = None) -> bool:
        """Whether it has ended, well or not; asks the server."""
        if not self._state.done:
            self._state.feed(await self._transport.unary(calls.get_operation(self.name), timeout))
        return self._state.done

    async def result(
        self,
        timeout: float | None = None,
        on_progress: Callable[[OperationProgress], object] | None = None,
    ) -> T:
        """Waits for the end; `on_progress` is called with each progress heard of meanwhile.

        Raises DeadlineExceededError after `timeout` seconds (None: no limit) and leaves the work going;
        CancelledError where it was cancelled; what the work failed with.
        """
        polls = Polls(self.name, timeout, on_progress is not None)
        while not self._state.done:
            wait_s = polls.wait_s()
            call = calls.wait_operation(self.name, wait_s)
            self._state.feed(await self._transport.unary(call, wait_s + self._transport.timeout_s(None)))
            if on_progress is not None:
                on_progress(self.progress)
            if not self._state.done:
                await asyncio.sleep(polls.pause_s())
        return self._state.result()

    async def cancel(self, *, timeout: float | None = None) -> None:
        """Asks the server to stop it; `result()` then raises CancelledError. Does nothing after its end."""
        await self._transport.unary(calls.cancel_operation(self.name), timeout)
