"""google.longrunning.Operations: long work asked after, waited for, cancelled, forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.longrunning import operations_pb2 as pb
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2

from glasshouse.server.operations.attribution.results import StoredResult
from glasshouse.server.operations.compute_directions import ComputedDirections
from glasshouse.server.operations.evaluate_dictionary import DictionaryEvaluation
from glasshouse.server.operations.manager import Operation, OperationManager, Progress
from glasshouse.server.operations.train_probe import TrainedOnModel
from glasshouse.server.types.errors import ServingError
from glasshouse.v1 import dictionaries_pb2

from . import fields
from .attribution.results import attribution_metadata, stored_message
from .call import Call
from .dictionary_messages import evaluation_message
from .direction_messages import computed_message, directions_metadata
from .pages import page
from .probe_messages import trained_message, training_metadata

# A wait is at most this long; whoever wants more asks again.
_MOST_WAIT_S = 60.0

# How an error becomes a status; the transport, which owns the table, sets it.
StatusOf = Callable[[ServingError], status_pb2.Status]


def operation_message(operation: Operation, status_of: StatusOf | None = None) -> pb.Operation:
    """An operation as it stands: its metadata, and once it has ended its response or its error."""
    message = pb.Operation(name=operation.name, done=operation.done)
    message.metadata.Pack(_metadata(operation))
    if operation.error is not None:
        assert status_of is not None, "an operation that has just been made has not failed"
        message.error.CopyFrom(status_of(operation.error))
    elif operation.done:
        message.response.Pack(_response(operation.result))
    return message


def _metadata(operation: Operation) -> Message:
    make = _METADATA.get(operation.kind)
    assert make is not None, f"operation {operation.kind} has no metadata message"
    return make(operation.progress)


def _response(result: Any) -> Message:
    make = _RESPONSES.get(type(result))
    assert make is not None, f"{type(result).__name__} has no response message"
    return make(result)


def _evaluation_metadata(progress: Progress) -> Message:
    return dictionaries_pb2.EvaluateDictionaryMetadata(
        phase=progress.phase,
        fraction=progress.fraction,
        tokens_done=progress.done,
        tokens_total=progress.total,
    )


# By an operation's kind, which is its method's name, and by the type of its result.
_METADATA: dict[str, Callable[[Progress], Message]] = {
    "EvaluateDictionary": _evaluation_metadata,
    "ComputeDirections": directions_metadata,
    "TrainProbe": training_metadata,
    "CreateAttributionGraph": attribution_metadata,
    "DiscoverCircuit": attribution_metadata,
}
_RESPONSES: dict[type, Callable[[Any], Message]] = {
    DictionaryEvaluation: evaluation_message,
    ComputedDirections: computed_message,
    TrainedOnModel: trained_message,
    StoredResult: stored_message,
}


class OperationServicer:
    """Serves `google.longrunning.Operations`."""

    def __init__(self, operations: OperationManager, status_of: StatusOf) -> None:
        self._operations = operations
        self._status_of = status_of

    async def ListOperations(
        self, request: pb.ListOperationsRequest, call: Call
    ) -> pb.ListOperationsResponse:
        """The operations known, the newest first."""
        found, token = page(
            self._operations.all(),
            page_size=request.page_size,
            page_token=request.page_token,
            default=50,
            most=1000,
        )
        return pb.ListOperationsResponse(
            operations=[operation_message(item, self._status_of) for item in found], next_page_token=token
        )

    async def GetOperation(self, request: pb.GetOperationRequest, call: Call) -> pb.Operation:
        """One operation."""
        return operation_message(self._operations.get(request.name), self._status_of)

    async def WaitOperation(self, request: pb.WaitOperationRequest, call: Call) -> pb.Operation:
        """The operation when it has ended, or as it stands when the time is up."""
        timeout_s = _MOST_WAIT_S
        if request.HasField("timeout"):
            timeout_s = request.timeout.seconds + request.timeout.nanos / 1e9
            if timeout_s < 0:
                raise fields.out_of_range("timeout", timeout_s, "0 or more seconds")
        operation = await self._operations.wait(request.name, min(timeout_s, _MOST_WAIT_S))
        return operation_message(operation, self._status_of)

    async def CancelOperation(self, request: pb.CancelOperationRequest, call: Call) -> empty_pb2.Empty:
        """Asks it to stop."""
        self._operations.cancel(request.name)
        return empty_pb2.Empty()

    async def DeleteOperation(self, request: pb.DeleteOperationRequest, call: Call) -> empty_pb2.Empty:
        """Forgets it, cancelled first where it still runs."""
        self._operations.delete(request.name)
        return empty_pb2.Empty()
