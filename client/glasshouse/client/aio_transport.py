"""Awaited calls over one channel: deadlines, retries, errors. `sync_transport` is its twin."""

# A timeout here is a gRPC deadline, which the server sees too: asyncio.timeout would not tell it.
# ruff: noqa: ASYNC109

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from glasshouse.client.calls import StreamCall, UnaryCall, UploadCall
from glasshouse.client.connection import Connection, new_request_id
from glasshouse.client.health import CHECK, WHOLE_SERVER, Readiness
from glasshouse.client.parsers import Page
from glasshouse.client.retry import Attempts
from glasshouse.client.transport import BaseTransport, cancelled

T = TypeVar("T")
EOF: Any = vars(grpc.aio)["EOF"]  # Missing from the type stubs.


class AsyncTransport(BaseTransport):
    """A channel, made by the first call because it belongs to the event loop that runs then."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._made: Any = None

    async def unary(self, call: UnaryCall[T], timeout: float | None) -> T:
        """Calls, with retries; the parsed response."""
        method = self.callable(call.method, self._channel().unary_unary)
        return call.parse(await self._answer(method, lambda: call.request, timeout))

    async def upload(self, call: UploadCall[T], timeout: float | None) -> T:
        """Sends the messages of a request, with retries; the parsed response."""
        method = self.callable(call.method, self._channel().stream_unary)
        return call.parse(await self._answer(method, lambda: iter(call.requests), timeout))

    async def _answer(self, method: Any, request: Callable[[], Any], timeout: float | None) -> Any:
        timeout_s = self.timeout_s(timeout)
        attempts = Attempts(timeout_s, self.connection.max_attempts)
        request_id = new_request_id()
        while True:
            try:
                return await method(
                    request(),
                    timeout=attempts.remaining_s(),
                    metadata=self.connection.metadata(request_id),
                )
            except grpc.RpcError as rpc_error:
                error = self.error(rpc_error, request_id, timeout_s)
                delay_s = attempts.delay_after(error)
                if delay_s is None:
                    raise error from None
                await asyncio.sleep(delay_s)

    async def items(
        self, page: Callable[[str], UnaryCall[Page[T]]], timeout: float | None
    ) -> AsyncIterator[T]:
        """The items of every page, each page fetched when the one before is used up."""
        token = ""
        while True:
            found = await self.unary(page(token), timeout)
            for item in found.items:
                yield item
            token = found.next_page_token
            if not token:
                return

    def stream(self, call: StreamCall, timeout: float | None) -> AsyncMessageStream:
        """Starts a call with a stream of responses."""
        method = self.callable(call.method, self._channel().unary_stream)
        return AsyncMessageStream(self, method, call.request, self.timeout_s(timeout))

    async def wait_ready(self, timeout: float | None) -> None:
        """Waits until the health service answers SERVING. Raises UnavailableError after `timeout` seconds."""
        timeout_s = self.timeout_s(timeout)
        wait = Readiness(self.connection.target, timeout_s)
        check = self._channel().unary_unary(CHECK)
        request_id = new_request_id()
        metadata = self.connection.metadata(request_id)
        while True:
            error = None
            try:
                if wait.is_serving(await check(WHOLE_SERVER, timeout=wait.remaining_s(), metadata=metadata)):
                    return
            except grpc.RpcError as rpc_error:
                error = self.error(rpc_error, request_id, timeout_s)
            await asyncio.sleep(wait.delay_after(error))

    async def close(self) -> None:
        """Closes the channel; calls under way are cancelled."""
        if self._made is not None:
            await self._made.close()

    def _channel(self) -> Any:
        if self._made is None:
            made = self.connection
            if made.credentials is None:
                self._made = grpc.aio.insecure_channel(made.target, options=made.options)
            else:
                self._made = grpc.aio.secure_channel(made.target, made.credentials, options=made.options)
        return self._made


class AsyncMessageStream:
    """The messages of one call as they come. Begins at once; tries again only before the first message."""

    def __init__(self, transport: AsyncTransport, method: Any, request: Any, timeout_s: float) -> None:
        self.request_id = new_request_id()
        self._transport = transport
        self._method = method
        self._request = request
        self._timeout_s = timeout_s
        self._attempts = Attempts(timeout_s, transport.connection.max_attempts)
        self._begun = False
        self._cancelled = asyncio.Event()
        self._rpc = self._start()

    async def read(self) -> Any:
        """The next message; None at the end. Raises GlasshouseError where the call fails."""
        while True:
            try:
                message = await self._rpc.read()
            except asyncio.CancelledError:
                # The same exception for a call that cancel() ended and for a task that is being cancelled.
                task = asyncio.current_task()
                if not self._cancelled.is_set() or (task is not None and task.cancelling()):
                    raise
                raise cancelled(self.request_id) from None
            except grpc.RpcError as rpc_error:
                error = self._transport.error(rpc_error, self.request_id, self._timeout_s)
                delay_s = None if self._begun else self._attempts.delay_after(error)
                if delay_s is None:
                    raise error from None
                if await self._cancelled_within(delay_s):
                    raise cancelled(self.request_id) from None
                self._rpc = self._start()
            else:
                if message is EOF:
                    return None
                self._begun = True
                return message

    def cancel(self) -> None:
        """Ends the call, here and at the server. Does nothing after its end."""
        self._cancelled.set()
        self._rpc.cancel()

    async def _cancelled_within(self, delay_s: float) -> bool:
        try:
            await asyncio.wait_for(self._cancelled.wait(), delay_s)
        except TimeoutError:
            return False
        return True

    def _start(self) -> Any:
        return self._method(
            self._request,
            timeout=self._attempts.remaining_s(),
            metadata=self._transport.connection.metadata(self.request_id),
        )
