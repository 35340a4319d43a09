"""Failures a fake server answers with: a code, words, and the details a real server sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from glasshouse.wire import reasons


@dataclass(frozen=True)
class Failure:
    """A refusal. `code` is a gRPC status code's name. Without `reason` the status carries no details at all,
    as when a proxy or gRPC itself answers."""

    code: str
    message: str
    reason: str = ""
    field: str = ""
    value: str = ""
    remedy: str = ""
    closest: tuple[str, ...] = ()
    retry_after_s: float | None = None
    next_version: str = ""

    @property
    def status_code(self) -> grpc.StatusCode:
        """The code as gRPC's enum."""
        return grpc.StatusCode[self.code]

    def trailing_metadata(self, request_id: str) -> tuple[tuple[str, bytes], ...]:
        """`google.rpc.Status` as trailing metadata: ErrorInfo always, and what belongs to the code."""
        if not self.reason:
            return ()
        named = {
            "field": self.field,
            "value": self.value,
            "remedy": self.remedy,
            "closest": ", ".join(self.closest),
            "next_version": self.next_version,
            "request_id": request_id,
        }
        metadata = {key: value for key, value in named.items() if value}
        details: list[Any] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=reasons.DOMAIN, metadata=metadata)
        ]
        if self.code == "INVALID_ARGUMENT":
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        elif self.code == "NOT_FOUND":
            details.append(error_details_pb2.ResourceInfo(resource_name=self.value, description=self.message))
        elif self.code == "FAILED_PRECONDITION":
            violation = error_details_pb2.PreconditionFailure.Violation(
                type=self.reason, subject=self.field, description=self.message
            )
            details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
        elif self.code == "RESOURCE_EXHAUSTED":
            violation = error_details_pb2.QuotaFailure.Violation(subject=self.field, description=self.message)
            details.append(error_details_pb2.QuotaFailure(violations=[violation]))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.status_code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return (("grpc-status-details-bin", status.SerializeToString()),)


class RefusedError(Exception):
    """A call ends in a failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def refused(code: str, message: str, **parts: Any) -> RefusedError:
    """A call ends in such a Failure."""
    return RefusedError(Failure(code, message, **parts))


def invalid(field: str, message: str, reason: str, remedy: str = "") -> RefusedError:
    """A call ends in INVALID_ARGUMENT."""
    return refused("INVALID_ARGUMENT", message, reason=reason, field=field, remedy=remedy)
