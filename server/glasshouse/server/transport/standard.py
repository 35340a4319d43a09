"""The standard services beside ours, health and reflection; malformed requests are answered as such."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer as HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

from .methods import MALFORMED, SERVICES, forgiving
from .status import message_of, trailers

if TYPE_CHECKING:
    # Generic in their stubs alone.
    Handler = grpc.GenericRpcHandler[Any, Any]
    MethodHandler = grpc.RpcMethodHandler[Any, Any]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _Handlers:
    """Stands in for a server where generated code registers handlers, and keeps them."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[Handler]) -> None:
        """Only the other registration is of use: it names the methods."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.found[service] = dict(handlers)


def health_handlers(servicer: Any) -> list[Handler]:
    """`grpc.health.v1.Health`."""
    found = _Handlers()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, found)
    return _guarded(found)


def reflection_handlers() -> list[Handler]:
    """`grpc.reflection.v1alpha.ServerReflection` over our services and the standard ones."""
    found = _Handlers()
    names = (*SERVICES, HEALTH_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), found)
    return _guarded(found)


def _guarded(found: _Handlers) -> list[Handler]:
    return [
        grpc.method_handlers_generic_handler(
            service, {name: _guard(handler) for name, handler in handlers.items()}
        )
        for service, handlers in found.found.items()
    ]


def _guard(handler: Any) -> MethodHandler:
    parse, serialize = forgiving(handler.request_deserializer), handler.response_serializer
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(_guard_stream(handler.stream_stream), parse, serialize)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(_guard_one(handler.unary_stream), parse, serialize)
    return grpc.unary_unary_rpc_method_handler(_guard_one(handler.unary_unary), parse, serialize)


def _guard_one(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Any, context: Any) -> Any:
        if request is MALFORMED:
            await _refuse(context)
        return await behaviour(request, context)

    return guarded


def _guard_stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async def checked() -> AsyncIterator[Any]:
            async for request in requests:
                if request is MALFORMED:
                    await _refuse(context)
                yield request

        async for response in behaviour(checked(), context):
            yield response

    return guarded


async def _refuse(context: Any) -> None:
    error = InvalidArgument(
        "the request's bytes are no message of this method",
        reason=reasons.MESSAGE_MALFORMED,
        remedy="serialise the request with protobuf",
    )
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message_of(error), trailers(error, ""))
