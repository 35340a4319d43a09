"""The one error table: which gRPC code each error has, and the `google.rpc.Status` that says the rest.

::

    always                  ErrorInfo{reason, domain "glasshouse", metadata: request_id, field, value, ...}
    INVALID_ARGUMENT        BadRequest with the field's path
    NOT_FOUND               ResourceInfo; the closest names are in ErrorInfo's metadata
    FAILED_PRECONDITION     PreconditionFailure
    RESOURCE_EXHAUSTED      QuotaFailure, and RetryInfo where trying again later can help
    UNAVAILABLE             RetryInfo

A status travels in a trailer, and gRPC clients drop calls whose trailers pass 8 KiB (their default): texts
are cut so that the whole stays below.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import quote

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from glasshouse.server.types import errors
from glasshouse.server.types.errors import ServingError
from glasshouse.wire import reasons

Code = grpc.StatusCode

CODES: Mapping[type[ServingError], grpc.StatusCode] = MappingProxyType(
    {
        errors.InvalidArgument: Code.INVALID_ARGUMENT,
        errors.NotFound: Code.NOT_FOUND,
        errors.AlreadyExists: Code.ALREADY_EXISTS,
        errors.FailedPrecondition: Code.FAILED_PRECONDITION,
        errors.ResourceExhausted: Code.RESOURCE_EXHAUSTED,
        errors.Unauthenticated: Code.UNAUTHENTICATED,
        errors.PermissionDenied: Code.PERMISSION_DENIED,
        errors.Unavailable: Code.UNAVAILABLE,
        errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
        errors.Cancelled: Code.CANCELLED,
        errors.Internal: Code.INTERNAL,
    }
)

DETAILS_KEY = "grpc-status-details-bin"

# Together below 8 KiB of trailers: details grow by a third in base64, the message by percent signs.
_MAX_MESSAGE_BYTES = 1200
_MAX_DETAILS_BYTES = 4400
_MAX_VALUE_BYTES = 400
_SHORT_VALUE_BYTES = 60


def code_of(error: ServingError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    raise AssertionError(f"no code for {type(error).__name__}")


def defect(request_id: str) -> errors.Internal:
    """What a caller learns of our own defect: nothing of its inside."""
    return errors.Internal(
        f"internal error; the server's log has it under request {request_id}",
        reason=reasons.DEFECT,
        remedy="report it with the request id",
    )


def message_of(error: ServingError) -> str:
    """The status message, short enough for a header."""
    text = _cut(error.message or error.reason, _MAX_MESSAGE_BYTES)
    while len(quote(text)) > _MAX_MESSAGE_BYTES:
        text = text[: len(text) * 3 // 4] + "…"
    return text


def trailers(error: ServingError, request_id: str) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries the details of an error."""
    return ((DETAILS_KEY, rich_status(error, request_id).SerializeToString()),)


def rich_status(error: ServingError, request_id: str) -> status_pb2.Status:
    """The `google.rpc.Status` of an error."""
    for limit in (_MAX_VALUE_BYTES, _SHORT_VALUE_BYTES):
        status = _status(error, request_id, limit)
        if status.ByteSize() <= _MAX_DETAILS_BYTES:
            return status
    # Only metadata of many keys is left to be that large; ErrorInfo's first entries and the message stay.
    del status.details[1:]
    return status


def _status(error: ServingError, request_id: str, limit: int) -> status_pb2.Status:
    number: int = code_of(error).value[0]
    status = status_pb2.Status(code=number, message=message_of(error))
    for detail in (_error_info(error, request_id, limit), *_specific(error, limit)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _error_info(error: ServingError, request_id: str, limit: int) -> error_details_pb2.ErrorInfo:
    facts = {
        "request_id": request_id,
        "field": error.field,
        "value": error.value,
        "remedy": error.remedy,
        **error.metadata,
    }
    metadata = {key: _cut(text, limit) for key, text in list(facts.items())[:16] if text}
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=reasons.DOMAIN, metadata=metadata)


def _specific(error: ServingError, limit: int) -> list[Message]:
    """The details that belong to the error's kind."""
    text, field = _cut(error.message, limit), _cut(error.field, limit)
    details: list[Message] = []
    match error:
        case errors.InvalidArgument() if field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=field, description=text, reason=error.reason
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        case errors.NotFound():
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type=_cut(error.resource_type, limit),
                    resource_name=_cut(error.resource_name, limit),
                    description=text,
                )
            )
        case errors.FailedPrecondition():
            unmet = error_details_pb2.PreconditionFailure.Violation(
                type=error.reason, subject=field, description=text
            )
            details.append(error_details_pb2.PreconditionFailure(violations=[unmet]))
        case errors.ResourceExhausted():
            quota = error_details_pb2.QuotaFailure.Violation(subject=field or "server", description=text)
            details.append(error_details_pb2.QuotaFailure(violations=[quota]))
        case _:
            pass
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _cut(text: str, limit: int) -> str:
    """`text` within `limit` bytes of UTF-8."""
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= limit:
        return raw.decode("utf-8")
    return raw[: limit - 3].decode("utf-8", errors="ignore") + "…"
