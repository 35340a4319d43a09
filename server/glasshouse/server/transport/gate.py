"""What every call passes through, in this order:

1. its request id is settled and echoed;
2. its key is checked, before anything that would tell what exists;
3. it is refused while the server drains, and over the bound of concurrent requests;
4. its deadline is set: the server's default where it has none, never beyond the server's most;
5. the service runs; whatever it raises becomes a status by the one table;
6. it is counted and logged.

A caller that goes away cancels the task of its call: the service's iterator is closed on the way out, which
frees the engine's place.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Any, cast
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from glasshouse.server.services.call import Call
from glasshouse.server.types.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from glasshouse.server.types.limits import Limits
from glasshouse.wire import reasons

from .keys import KeyRing
from .logs import Logger
from .methods import MALFORMED, Method, forgiving, serialize
from .metrics import Metrics
from .status import code_of, defect, message_of, trailers

Context = grpc.aio.ServicerContext[Any, Any]
UnaryBehaviour = Callable[[Any, Call], Awaitable[Message]]
StreamBehaviour = Callable[[Any, Call], AsyncIterator[Message | bytes]]

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_AUTHORIZATION_KEY = "authorization"
# How long a caller is told to wait before it tries again.
_RETRY_BUSY_S = 0.5
_RETRY_DRAINING_S = 2.0
# What is taken of an upload that was refused.
_REST_S = 2.0
_REST_MESSAGES = 64
# What two readings of the clock may be apart.
_CLOCK_S = 0.01


class Gate:
    """Lets calls through to the services, one `handler` a method."""

    def __init__(self, *, keys: KeyRing, limits: Limits, metrics: Metrics, log: Logger) -> None:
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._log = log
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(
        self, method: Method, behaviour: UnaryBehaviour | StreamBehaviour
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """What grpc calls for `method`."""
        parse = forgiving(method.request_class.FromString)
        if method.takes_stream:
            take = self._answer(cast(UnaryBehaviour, behaviour))

            async def gather(requests: AsyncIterator[Any], context: Context) -> Any:
                return await self._serve(
                    method, _well_formed(method, requests), context, take, upload=requests
                )

            return grpc.stream_unary_rpc_method_handler(gather, parse, serialize)
        if method.streams:
            pump = self._pump(cast(StreamBehaviour, behaviour))

            async def stream(request: Any, context: Context) -> None:
                await self._serve(method, request, context, pump)

            return grpc.unary_stream_rpc_method_handler(stream, parse, serialize)
        answer = self._answer(cast(UnaryBehaviour, behaviour))

        async def unary(request: Any, context: Context) -> Any:
            return await self._serve(method, request, context, answer)

        return grpc.unary_unary_rpc_method_handler(unary, parse, serialize)

    async def idle(self) -> None:
        """Returns when no call is being served."""
        await self._idle.wait()

    async def _serve(
        self,
        method: Method,
        request: Any,
        context: Context,
        work: Callable[[Any, Call, Context], Awaitable[Any]],
        *,
        upload: AsyncIterator[Any] | None = None,
    ) -> Any:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        call = Call(_request_id(metadata.get(REQUEST_ID_KEY)), self._metrics)
        facts: dict[str, object] = {}
        code = grpc.StatusCode.OK
        failure: ServingError | None = None
        result: Any = None
        self._metrics.begin(stream=method.streams)
        self._idle.clear()
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))
            limit_s = self._time_limit(context)
            async with asyncio.timeout(limit_s) as timer:
                name = self._keys.admit(metadata.get(_AUTHORIZATION_KEY), admin=method.admin)
                if name:
                    facts["key"] = call.caller = name
                self._admit(method, request)
                result = await work(request, call, context)
                if call.trailing:
                    context.set_trailing_metadata(tuple(call.trailing))
        except asyncio.CancelledError:
            code = _code_of_cancellation(context)
            raise
        except ServingError as error:
            failure = error
        except TimeoutError as error:
            failure = _deadline(limit_s) if timer.expired() else self._defect(error, method, call)
        except Exception as error:
            failure = self._defect(error, method, call)
        finally:
            self._metrics.end(stream=method.streams)
            if not self._metrics.active_requests:
                self._idle.set()
            if failure is not None:
                code = code_of(failure)
            self._record(method, call, code, failure, context, facts)
        if failure is not None:
            if upload is not None:
                await _take_the_rest(upload)
            await context.abort(code, message_of(failure), trailers(failure, call.request_id))
        return result

    def _answer(self, behaviour: UnaryBehaviour) -> Callable[[Any, Call, Context], Awaitable[Message]]:
        most = self._limits.max_message_bytes

        async def answer(request: Any, call: Call, context: Context) -> Message:
            response = await behaviour(request, call)
            size = response.ByteSize()
            if size > most:
                raise ResourceExhausted(
                    f"the answer takes {size} bytes, a message holds {most}",
                    reason=reasons.MESSAGE_TOO_LARGE,
                    value=size,
                    remedy="ask for less at a time",
                    metadata={"limit": str(most)},
                )
            return response

        return answer

    @staticmethod
    def _pump(behaviour: StreamBehaviour) -> Callable[[Any, Call, Context], Awaitable[None]]:
        async def pump(request: Any, call: Call, context: Context) -> None:
            events = cast("AsyncGenerator[Message | bytes, None]", behaviour(request, call))
            write = context.write
            async with aclosing(events):
                async for event in events:
                    await write(event)

        return pump

    def _admit(self, method: Method, request: Any) -> None:
        if self.draining:
            raise Unavailable(
                "the server is shutting down and takes no new requests",
                reason=reasons.SERVER_DRAINING,
                remedy="try again: another server, or this one once it is back",
                retry_after_s=_RETRY_DRAINING_S,
            )
        most = self._limits.max_concurrent_requests
        if self._metrics.active_requests > most:
            raise ResourceExhausted(
                f"{most} requests are being served, as many as this server takes at once",
                reason=reasons.QUEUE_FULL,
                value=most,
                remedy="try again after the delay in RetryInfo",
                retry_after_s=_RETRY_BUSY_S,
                metadata={"limit": str(most), "setting": "limits.max_concurrent_requests"},
            )
        if request is MALFORMED:
            raise _malformed(method)

    def _time_limit(self, context: Context) -> float:
        remaining: float | None = context.time_remaining()
        if remaining is None:
            return self._limits.default_deadline_s
        return min(remaining, self._limits.max_deadline_s)

    def _defect(self, error: Exception, method: Method, call: Call) -> ServingError:
        self._log.error("defect", method=method.name, request_id=call.request_id, exc_info=error)
        return defect(call.request_id)

    def _record(
        self,
        method: Method,
        call: Call,
        code: grpc.StatusCode,
        failure: ServingError | None,
        context: Context,
        facts: dict[str, object],
    ) -> None:
        seconds = perf_counter() - call.started
        self._metrics.request(method.name, code.name, seconds)
        if call.prompt_tokens:
            facts["prompt_tokens"] = call.prompt_tokens
        if call.generated_tokens:
            facts["generated_tokens"] = call.generated_tokens
        if call.readout_bytes:
            facts["readout_bytes"] = call.readout_bytes
        if failure is not None:
            facts["reason"] = failure.reason
            if failure.field:
                facts["field"] = failure.field
        self._log.info(
            "request",
            method=method.name,
            code=code.name,
            duration_ms=round(seconds * 1000, 2),
            peer=unquote(context.peer()),
            request_id=call.request_id,
            **facts,
        )


async def _take_the_rest(upload: AsyncIterator[Any]) -> None:
    """Takes what a refused caller is still sending: an asyncio client that is refused while it sends is told of an error of
    its own and not of the refusal. Somebody who does not come to an end is cut off all the same.
    """
    with suppress(Exception):
        async with asyncio.timeout(_REST_S):
            for _ in range(_REST_MESSAGES):
                await anext(upload)


async def _well_formed(method: Method, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The messages of a caller's stream, up to one that is none."""
    async for request in requests:
        if request is MALFORMED:
            raise _malformed(method)
        yield request


def _malformed(method: Method) -> InvalidArgument:
    kind = method.request_class.DESCRIPTOR.full_name
    return InvalidArgument(
        f"the request's bytes are not a {kind}: cut short, no protobuf, or text that is not UTF-8",
        reason=reasons.MESSAGE_MALFORMED,
        remedy=f"serialise a {kind} with protobuf, text as UTF-8",
    )


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex


def _code_of_cancellation(context: Context) -> grpc.StatusCode:
    """grpc cancels a call's task when its caller leaves and when its caller's deadline passes."""
    remaining: float | None = context.time_remaining()
    past = remaining is not None and remaining < _CLOCK_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if past else grpc.StatusCode.CANCELLED


def _deadline(limit_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the request was not done within its {max(limit_s, 0):.3g} seconds",
        reason=reasons.DEADLINE,
        value=f"{max(limit_s, 0):.3f}",
        remedy="give the call more time, up to the server's limits.max_deadline_s, or ask for less",
    )
