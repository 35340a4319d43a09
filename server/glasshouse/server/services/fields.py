"""Checks of single fields. Each raises a `ServingError` that names the field, the value and what to do."""

from __future__ import annotations

import math

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from glasshouse.wire import reasons

# Largest finite float32: model code computes in float32 or less, where anything larger is infinite.
LARGEST_F32 = 3.4028234663852886e38


def required(field: str, what: str, remedy: str) -> InvalidArgument:
    """The error of a field that is not there."""
    return InvalidArgument(
        f"{field} is required: {what}", reason=reasons.FIELD_REQUIRED, field=field, remedy=remedy
    )


def out_of_range(field: str, value: object, bounds: str) -> InvalidArgument:
    """The error of a value outside `bounds`, a phrase such as "from 0 to 100"."""
    return InvalidArgument(
        f"{field} is {value!s:.100}, it must be {bounds}",
        reason=reasons.VALUE_OUT_OF_RANGE,
        field=field,
        value=value,
        remedy=f"give a value {bounds}",
    )


def not_served(field: str, kind: str) -> FailedPrecondition:
    """The error of something the protocol has and this server does not."""
    return FailedPrecondition(
        f"{field}: this server does not serve {kind}",
        reason=reasons.CAPABILITY_MISSING,
        field=field,
        value=kind,
        remedy="use another kind, or a server whose model lists the capability",
    )


def over_limit(field: str, value: int, limit: int, setting: str, what: str) -> ResourceExhausted:
    """The error of a request over one of the server's bounds, `limits.{setting}`."""
    return ResourceExhausted(
        f"{field}: {value} {what}, this server takes at most {limit}",
        reason=reasons.LIMIT_EXCEEDED,
        field=field,
        value=value,
        remedy=f"send less, or ask the operator to raise limits.{setting}",
        metadata={"limit": str(limit), "setting": f"limits.{setting}"},
    )


def finite(value: float, field: str) -> float:
    """`value`, where it is finite as a float32."""
    if not math.isfinite(value) or abs(value) > LARGEST_F32:
        raise InvalidArgument(
            f"{field} is {value}, which is not a finite float32",
            reason=reasons.VALUE_NOT_FINITE,
            field=field,
            value=value,
            remedy="give a finite number",
        )
    return value


def whole(value: int, field: str, low: int, high: int) -> int:
    """`value`, where it is within [low, high]."""
    if not low <= value <= high:
        raise out_of_range(field, value, f"from {low} to {high}")
    return value


def count(n: int, field: str, limit: int, setting: str, what: str) -> None:
    """Refuses more than the server's `limits.{setting}` entries."""
    if n > limit:
        raise over_limit(field, n, limit, setting, what)
