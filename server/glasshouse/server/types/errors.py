"""The errors a caller can cause or meet.

::

    ServingError
    ├── InvalidArgument        a field of the request is wrong, whatever the server's state
    ├── NotFound               a named resource does not exist (closest names offered)
    ├── AlreadyExists          a name and version are taken by something else
    ├── FailedPrecondition     the request is fine, this server or model cannot serve it
    ├── ResourceExhausted      a bound is reached: queue, bytes, budget (retry where it says so)
    ├── Unauthenticated        no valid key
    ├── PermissionDenied       the key may not do this
    ├── Unavailable            the server is starting, draining or its engine is gone
    ├── DeadlineExceeded       the caller's or the server's time limit passed
    ├── Cancelled              the caller went away
    └── Internal               our own defect; the message carries no internals

Each names what is wrong (`field`, `value`), why (`reason`, one of `glasshouse.wire.reasons`) and what to do
about it (`remedy`). `transport.status` holds the one table that maps these classes to gRPC codes.
"""

from __future__ import annotations

from collections.abc import Mapping


class ServingError(Exception):
    """An error with a reason, and where they apply a field, a value and a remedy.

    `field` is the dotted path in the request message, such as ``interventions[2].hook_point``. `value` is what
    stood there, shortened to 200 characters. `retry_after_s` is set where trying again later can help.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        field: str = "",
        value: object = None,
        remedy: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.value = "" if value is None else str(value)[:200]
        self.remedy = remedy
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def at(self, prefix: str) -> ServingError:
        """The same error with its field path put under `prefix` (in place; returns self)."""
        joined = (
            f"{prefix}.{self.field}" if self.field and not self.field.startswith("[") else prefix + self.field
        )
        self.field = joined
        return self


class InvalidArgument(ServingError):
    """A field of the request is wrong."""


class NotFound(ServingError):
    """A named resource does not exist; `closest` are the nearest existing names."""

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        resource_type: str,
        resource_name: str,
        closest: tuple[str, ...] = (),
        field: str = "",
        remedy: str = "",
    ) -> None:
        metadata = {"closest": ", ".join(closest)} if closest else {}
        super().__init__(
            message, reason=reason, field=field, value=resource_name, remedy=remedy, metadata=metadata
        )
        self.resource_type = resource_type
        self.resource_name = resource_name
        self.closest = closest


class AlreadyExists(ServingError):
    """A name and version are taken by something else."""


class FailedPrecondition(ServingError):
    """The request is well formed but this server or model cannot serve it."""


class ResourceExhausted(ServingError):
    """A bound is reached."""


class Unauthenticated(ServingError):
    """No valid credentials came with the request."""


class PermissionDenied(ServingError):
    """The credentials do not allow this."""


class Unavailable(ServingError):
    """The server cannot take requests now."""


class DeadlineExceeded(ServingError):
    """A time limit passed before the work was done."""


class Cancelled(ServingError):
    """The caller went away."""


class Internal(ServingError):
    """Our own defect."""
