"""What a call can raise.

::

    GlasshouseError                  also INTERNAL, UNKNOWN and any code not below
    ├── InvalidArgumentError         a field of the request is wrong (also a ValueError)
    ├── NotFoundError                no such model, hook point, ...; `.closest` are the nearest names
    ├── AlreadyExistsError           a name and version are taken; `.next_version` is free
    ├── FailedPreconditionError      a fine request that this server or model cannot serve
    ├── ResourceExhaustedError       a bound is reached; `.retry_after_s` where waiting helps
    ├── UnauthenticatedError         no valid key came with the request
    ├── PermissionDeniedError        the key may not do this
    ├── UnavailableError             no server answers, or it is starting or draining
    ├── DeadlineExceededError        the call's timeout passed
    └── CancelledError               the call was cancelled

Each says where (`field`), why (`reason`, one of the stable names of `glasshouse.wire.reasons`) and what to do
about it (`remedy`), and carries the `request_id` under which the server's log knows the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class GlasshouseError(Exception):
    """A call failed. Attributes that do not apply are empty strings, an empty mapping, or None.

    `message` is the server's sentence alone; `str()` adds the field, the remedy, the reason and the request
    id. `code` is the gRPC status code, such as ``"NOT_FOUND"``. `metadata` holds every value the server
    named.
    """

    CODE: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        remedy: str = "",
        request_id: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.reason = reason
        self.remedy = remedy
        self.request_id = request_id
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.code = code or self.CODE

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field and self.field not in self.message else ""
        sentences = [_sentence(where + (self.message or self.code))]
        if self.remedy and self.remedy not in self.message:
            sentences.append(_sentence(self.remedy[0].upper() + self.remedy[1:]))
        if self.retry_after_s is not None:
            sentences.append(f"Retry after {self.retry_after_s:g} s.")
        origin = ", ".join(filter(None, (self.reason, self.request_id and f"request {self.request_id}")))
        if origin:
            sentences.append(f"[{origin}]")
        return " ".join(sentences)


class InvalidArgumentError(GlasshouseError, ValueError):
    """A field of the request is wrong. Raised by the client too, for values the wire cannot carry."""

    CODE = "INVALID_ARGUMENT"


class NotFoundError(GlasshouseError):
    """A named thing does not exist."""

    CODE = "NOT_FOUND"

    @property
    def closest(self) -> tuple[str, ...]:
        """The nearest existing names, best first."""
        names = self.metadata.get("closest", "")
        return tuple(name.strip() for name in names.split(",") if name.strip())


class AlreadyExistsError(GlasshouseError):
    """A name and version are taken by something else."""

    CODE = "ALREADY_EXISTS"

    @property
    def next_version(self) -> int | None:
        """The version that is free; None where the name itself is taken."""
        found = self.metadata.get("next_version", "")
        return int(found) if found.isdigit() else None


class FailedPreconditionError(GlasshouseError):
    """The request is well formed but this server or model cannot serve it."""

    CODE = "FAILED_PRECONDITION"


class ResourceExhaustedError(GlasshouseError):
    """A bound is reached: the queue, a limit on size or count, a budget."""

    CODE = "RESOURCE_EXHAUSTED"


class UnauthenticatedError(GlasshouseError):
    """No valid key came with the request."""

    CODE = "UNAUTHENTICATED"


class PermissionDeniedError(GlasshouseError):
    """The key may not do this."""

    CODE = "PERMISSION_DENIED"


class UnavailableError(GlasshouseError):
    """No server answers at the target, or it is starting or draining."""

    CODE = "UNAVAILABLE"


class DeadlineExceededError(GlasshouseError):
    """The call's timeout passed before it was done."""

    CODE = "DEADLINE_EXCEEDED"


class CancelledError(GlasshouseError):
    """The call was cancelled, here or by the server."""

    CODE = "CANCELLED"


BY_CODE: dict[str, type[GlasshouseError]] = {
    error.CODE: error
    for error in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        FailedPreconditionError,
        ResourceExhaustedError,
        UnauthenticatedError,
        PermissionDeniedError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
    )
}
"""gRPC status code -> exception; any other code is GlasshouseError itself."""


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."
