"""A long operation as the server tells of it, without transport: what both handles hold and both show.

1. A call answers with an operation: a name, perhaps already done.
2. Each poll waits at the server for a while and brings its state: progress, or the end.
3. The end is a result, or a status that becomes the exception a plain call would have raised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from glasshouse.client.exceptions import DeadlineExceededError, GlasshouseError
from glasshouse.client.statuses import error_from_status
from glasshouse.wire import reasons

T = TypeVar("T")

WATCHED_WAIT_S: Final = 0.5
"""How long a poll waits at the server where somebody watches the progress, and at most where nobody does."""
UNWATCHED_WAIT_S: Final = 10.0
LEAST_PERIOD_S: Final = 0.1
"""Polls start no closer together, even where the server answers each at once."""


@dataclass(frozen=True)
class OperationProgress:
    """How far an operation has come: what it is doing, 0 to 1, and what it counts."""

    phase: str = "queued"
    fraction: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        return f"{self.phase} {self.fraction:.0%}" + (f" ({counts})" if counts else "")


@dataclass(frozen=True)
class OperationKind(Generic[T]):
    """What an operation's metadata and response are, and what makes its result."""

    metadata: type[Message]
    response: type[Message]
    parse: Callable[[Any], T]


class OperationState(Generic[T]):
    """The last that is known of an operation."""

    def __init__(self, kind: OperationKind[T], operation: Any) -> None:
        self.kind = kind
        self.feed(operation)

    def feed(self, operation: operations_pb2.Operation) -> None:
        """Takes in the operation as the server has it now."""
        self.name: str = operation.name
        self.done: bool = operation.done
        self.progress = self._progress(operation)
        self._operation = operation

    def result(self) -> T:
        """The result; once done. Raises GlasshouseError for an operation that failed or was cancelled."""
        operation = self._operation
        if operation.HasField("error"):
            raise error_from_status(operation.error)
        response = self.kind.response()
        if not operation.response.Unpack(response):
            what = f"{self.name} ended with {operation.response.type_url or 'nothing'}"
            raise GlasshouseError(what, code="INTERNAL", reason=reasons.MESSAGE_MALFORMED)
        return self.kind.parse(response)

    def _progress(self, operation: Any) -> OperationProgress:
        """Fields every metadata has, `phase` and `fraction`, and its whole numbers as counts."""
        metadata: Any = self.kind.metadata()
        if not operation.metadata.Unpack(metadata):
            return OperationProgress("done", 1.0) if operation.done else OperationProgress()
        counts = {
            known.name: getattr(metadata, known.name)
            for known in metadata.DESCRIPTOR.fields
            if known.cpp_type in (known.CPPTYPE_INT32, known.CPPTYPE_INT64)
        }
        return OperationProgress(metadata.phase, metadata.fraction, counts)


class OperationView(Generic[T]):
    """What a handle shows of its operation: shared by the sync and the async handle."""

    def __init__(self, transport: Any, state: OperationState[T]) -> None:
        self._transport = transport
        self._state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.progress})"

    @property
    def name(self) -> str:
        """Its name at the server."""
        return self._state.name

    @property
    def progress(self) -> OperationProgress:
        """How far it had come when it was last asked for: by `done()`, or while `result()` waits."""
        return self._state.progress


class Polls:
    """The polls of one wait for an operation. The clock starts when this is made."""

    def __init__(self, name: str, timeout_s: float | None, watched: bool) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._wait_s = WATCHED_WAIT_S if watched else UNWATCHED_WAIT_S
        self._started = time.monotonic()

    def wait_s(self) -> float:
        """Seconds the next poll may wait at the server. Raises DeadlineExceededError where none are left."""
        self._started = time.monotonic()
        if self._deadline is None:
            return self._wait_s
        remaining = self._deadline - self._started
        if remaining <= 0:
            raise DeadlineExceededError(
                f"{self._name} is not done within {self._timeout_s:g} s",
                reason=reasons.DEADLINE,
                remedy="It goes on: ask for its result again, or cancel it",
            )
        return min(self._wait_s, remaining)

    def pause_s(self) -> float:
        """Seconds to sleep before the next poll: 0 where the last one waited at the server."""
        pause = max(LEAST_PERIOD_S - (time.monotonic() - self._started), 0.0)
        return pause if self._deadline is None else min(pause, max(self._deadline - time.monotonic(), 0.0))
