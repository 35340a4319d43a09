"""The error table and the statuses made from it."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2

from glasshouse.server.transport.status import CODES, code_of, defect, message_of, rich_status, trailers
from glasshouse.server.types import errors
from glasshouse.server.types.errors import ServingError
from glasshouse.wire import reasons


def every_error() -> list[type[ServingError]]:
    found: list[type[ServingError]] = []
    waiting = [ServingError]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            found.append(kind)
            waiting.append(kind)
    return found


def make(kind: type[ServingError], message: str = "what is wrong", **fields: Any) -> ServingError:
    if issubclass(kind, errors.NotFound):
        return kind(message, resource_type="T", resource_name="n", **{"reason": "R", "field": "f", **fields})
    return kind(message, **{"reason": "R", "field": "f", **fields})


def unpacked(status: Any, kind: type[Any]) -> Any:
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    raise AssertionError(f"no {kind.__name__}")


def test_every_error_has_its_code_and_every_code_but_ok_and_those_of_grpc_its_error() -> None:
    assert set(every_error()) == set(CODES)
    assert len(set(CODES.values())) == len(CODES)
    unused = {"OK", "UNKNOWN", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "DATA_LOSS"}
    assert {code.name for code in grpc.StatusCode} - {code.name for code in CODES.values()} == unused


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_error_info_is_always_there(kind: type[ServingError]) -> None:
    status = rich_status(make(kind, remedy="do that", value=7, metadata={"limit": "9"}) if kind is not errors.NotFound
                         else make(kind, remedy="do that"), "id-1")  # fmt: skip
    info = unpacked(status, error_details_pb2.ErrorInfo)
    assert status.code == code_of(make(kind)).value[0]
    assert (info.reason, info.domain) == ("R", "glasshouse")
    assert info.metadata["request_id"] == "id-1"
    assert info.metadata["field"] == "f"
    assert info.metadata["remedy"] == "do that"


def test_the_details_of_each_kind() -> None:
    invalid = rich_status(make(errors.InvalidArgument), "")
    assert unpacked(invalid, error_details_pb2.BadRequest).field_violations[0].field == "f"
    missing = rich_status(make(errors.NotFound, closest=("a", "b")), "")
    assert unpacked(missing, error_details_pb2.ResourceInfo).resource_type == "T"
    assert unpacked(missing, error_details_pb2.ErrorInfo).metadata["closest"] == "a, b"
    unmet = rich_status(make(errors.FailedPrecondition), "")
    assert unpacked(unmet, error_details_pb2.PreconditionFailure).violations[0].type == "R"
    full = rich_status(make(errors.ResourceExhausted, retry_after_s=1.5), "")
    assert unpacked(full, error_details_pb2.QuotaFailure).violations[0].subject == "f"
    delay = unpacked(full, error_details_pb2.RetryInfo).retry_delay
    assert (delay.seconds, delay.nanos) == (1, 500_000_000)


@pytest.mark.parametrize("text", ["x" * 50_000, "語" * 20_000, "%\n" * 9000, "\ud800" * 5000, ""])
@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_trailers_stay_below_8_kib(kind: type[ServingError], text: str) -> None:
    fields: dict[str, Any] = {"field": text, "remedy": text, "reason": "R" * 63}
    if issubclass(kind, errors.NotFound):
        fields["closest"] = tuple([text[:2000]] * 10)
    else:
        fields |= {"value": text, "metadata": {f"key{i}": text for i in range(50)}, "retry_after_s": 1.0}
    error = make(kind, text, **fields)
    ((key, details),) = trailers(error, "r" * 128)
    size = len(key) + len(base64.b64encode(details)) + len("grpc-message") + len(quote(message_of(error)))
    assert size < 8192 - 256
    assert len(rich_status(error, "").details) >= 1


def test_a_defect_tells_nothing_but_its_request() -> None:
    error = defect("id-9")
    assert (code_of(error), error.reason) == (grpc.StatusCode.INTERNAL, reasons.DEFECT)
    assert "id-9" in error.message
