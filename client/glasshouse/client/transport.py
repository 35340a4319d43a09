"""What both transports share: timeouts, errors, and the callables of a channel's methods."""

from __future__ import annotations

from typing import Any

import grpc

from glasshouse.client.calls import Method
from glasshouse.client.connection import Connection, checked_timeout
from glasshouse.client.exceptions import CancelledError, GlasshouseError
from glasshouse.client.statuses import error_from_rpc
from glasshouse.wire import reasons


class BaseTransport:
    """A connection's settings and the callables made so far."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._callables: dict[str, Any] = {}

    def timeout_s(self, timeout: float | None) -> float:
        """A call's timeout, or else the client's."""
        return self.connection.timeout_s if timeout is None else checked_timeout(timeout)

    def error(self, rpc_error: grpc.RpcError, request_id: str, timeout_s: float) -> GlasshouseError:
        """The exception for a failed call."""
        return error_from_rpc(
            rpc_error, target=self.connection.target, request_id=request_id, timeout_s=timeout_s
        )

    def callable(self, method: Method, kind: Any) -> Any:
        """The callable of a method; `kind` is its channel's `unary_unary` or `unary_stream`."""
        found = self._callables.get(method.path)
        if found is None:
            found = kind(
                method.path,
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=method.response.FromString,
            )
            self._callables[method.path] = found
        return found


def cancelled(request_id: str) -> CancelledError:
    """The call was cancelled on this side."""
    return CancelledError("the call was cancelled", reason=reasons.CALLER_GONE, request_id=request_id)
