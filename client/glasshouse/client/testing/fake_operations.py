"""The operations of a fake server: each poll moves one on, and the last of them ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.rpc import status_pb2

from glasshouse.client.testing.failures import Failure, refused
from glasshouse.v1 import dictionaries_pb2
from glasshouse.wire import reasons

# Phase, fraction, done and total, as the metadata of an operation.
Describe = Callable[[str, float, int, int], Any]


def _measuring(phase: str, fraction: float, done: int, total: int) -> Any:
    return dictionaries_pb2.EvaluateDictionaryMetadata(
        phase=phase, fraction=fraction, tokens_done=done, tokens_total=total
    )


@dataclass
class _Running:
    total: int
    response: Any
    describe: Describe
    polls: int = 0
    failure: Failure | None = None


class FakeOperations:
    """`google.longrunning.Operations`. An operation is done after `polls` polls."""

    def __init__(self, polls: int) -> None:
        self._polls = polls
        self._operations: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._planned: list[Failure] = []

    def plan(self, failure: Failure) -> None:
        """The next operation to start ends in this failure."""
        self._planned.append(failure)

    def start(self, total: int, response: Any, describe: Describe = _measuring) -> operations_pb2.Operation:
        """A new operation over `total` tokens or examples."""
        with self._lock:
            name = f"operations/{len(self._operations) + 1}"
            failure = self._planned.pop(0) if self._planned else None
            self._operations[name] = _Running(total, response, describe, failure=failure)
            return self._message(name)

    def get(self, request: operations_pb2.GetOperationRequest) -> operations_pb2.Operation:
        """Where it stands; it moves on."""
        with self._lock:
            self._running(request.name).polls += 1
            return self._message(request.name)

    def wait(self, request: operations_pb2.WaitOperationRequest) -> operations_pb2.Operation:
        """The same, at once."""
        with self._lock:
            self._running(request.name).polls += 1
            return self._message(request.name)

    def cancel(self, request: operations_pb2.CancelOperationRequest) -> empty_pb2.Empty:
        """It ends as cancelled, if it has not ended yet."""
        with self._lock:
            running = self._running(request.name)
            if running.polls < self._polls:
                running.polls = self._polls
                running.failure = Failure(
                    "CANCELLED", "the operation was cancelled", reason=reasons.CALLER_GONE
                )
        return empty_pb2.Empty()

    def _running(self, name: str) -> _Running:
        if name not in self._operations:
            message = f"no operation {name!r}"
            raise refused("NOT_FOUND", message, reason=reasons.RESOURCE_NOT_FOUND, field="name", value=name)
        return self._operations[name]

    def _message(self, name: str) -> operations_pb2.Operation:
        running = self._operations[name]
        done = min(running.polls, self._polls)
        message = operations_pb2.Operation(name=name, done=done == self._polls)
        message.metadata.Pack(
            running.describe(
                "done" if message.done else "measuring" if done else "queued",
                done / self._polls,
                running.total * done // self._polls,
                running.total,
            )
        )
        if message.done and running.failure is not None:
            ((_, status),) = running.failure.trailing_metadata("")
            message.error.CopyFrom(status_pb2.Status.FromString(status))
        elif message.done:
            message.response.Pack(running.response)
        return message
