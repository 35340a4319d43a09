"""gRPC statuses -> exceptions: the server's `google.rpc.Status` details, or else sensible words."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from glasshouse.client.exceptions import BY_CODE, GlasshouseError
from glasshouse.wire import reasons

STATUS_DETAILS_KEY = "grpc-status-details-bin"
CODE_NAMES: Final[dict[int, str]] = {code.value[0]: code.name for code in grpc.StatusCode}
UNREACHABLE = "UNREACHABLE"
"""`reason` where no server answered at all."""


def error_from_rpc(
    rpc_error: grpc.RpcError, *, target: str, request_id: str, timeout_s: float
) -> GlasshouseError:
    """The exception for a failed call, sync or async (both carry code, details and trailing metadata)."""
    call: Any = rpc_error
    code: str = call.code().name
    fields = _details(call.trailing_metadata() or ())
    if "reason" not in fields:
        fields |= _without_details(code, call.details() or "", target, timeout_s)
    fields.setdefault("message", call.details() or "")
    fields["request_id"] = fields.get("request_id") or request_id
    return BY_CODE.get(code, GlasshouseError)(code=code, **fields)


def error_from_status(status: Any) -> GlasshouseError:
    """The exception for a `google.rpc.Status` that came as a message, as the error of an operation does."""
    code = CODE_NAMES.get(status.code, "UNKNOWN")
    return BY_CODE.get(code, GlasshouseError)(code=code, **({"message": status.message} | _fields(status)))


def _details(trailing_metadata: Any) -> dict[str, Any]:
    """What the status details say, by GlasshouseError's names; empty where there are none or they are
    damaged."""
    from google.rpc import status_pb2

    raw = next((value for key, value in trailing_metadata if key == STATUS_DETAILS_KEY), None)
    if raw is None:
        return {}
    try:
        return _fields(status_pb2.Status.FromString(raw))
    except DecodeError:
        return {}


def _fields(status: Any) -> dict[str, Any]:
    """A status by GlasshouseError's names; empty where its details are damaged."""
    from google.rpc import error_details_pb2

    fields: dict[str, Any] = {"message": status.message}
    try:
        for packed in status.details:
            if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(packed.value)
                metadata = dict(info.metadata)
                fields |= {"reason": info.reason, "metadata": metadata}
                fields |= {key: metadata[key] for key in ("field", "remedy", "request_id") if key in metadata}
            elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations = error_details_pb2.BadRequest.FromString(packed.value).field_violations
                if violations:
                    fields.setdefault("field", violations[0].field)
            elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(packed.value).retry_delay
                fields["retry_after_s"] = delay.seconds + delay.nanos / 1e9
    except DecodeError:
        return {}
    return fields


def _without_details(code: str, details: str, target: str, timeout_s: float) -> dict[str, str]:
    """Words for the statuses that gRPC makes by itself, on this side of the wire or the other."""
    if code == "UNAVAILABLE":
        return {
            "message": f"no server answers at {target} ({details})",
            "reason": UNREACHABLE,
            "remedy": "Check that `glasshouse serve` is running there and that the TLS settings match",
        }
    if code == "DEADLINE_EXCEEDED":
        return {
            "message": f"not done within {timeout_s:g} s",
            "reason": reasons.DEADLINE,
            "remedy": "Pass a larger timeout=, or ask for less",
        }
    if code == "CANCELLED":
        return {"message": "the call was cancelled", "reason": reasons.CALLER_GONE}
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
        return {
            "message": details,
            "reason": reasons.MESSAGE_TOO_LARGE,
            "remedy": "Send or ask for less in one call",
        }
    return {}
