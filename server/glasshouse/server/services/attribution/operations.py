"""What both operations of attribution share."""

from __future__ import annotations

from google.longrunning import operations_pb2

from glasshouse.server.operations.attribution.lanes import Ticket
from glasshouse.server.operations.manager import Operation, Progress

from .. import fields
from .results import attribution_metadata


def started(operation: Operation) -> operations_pb2.Operation:
    """An operation that has just been submitted."""
    message = operations_pb2.Operation(name=operation.name)
    message.metadata.Pack(attribution_metadata(operation.progress))
    return message


def telling(progress: Progress) -> Ticket:
    """A ticket that keeps an operation's progress."""

    def told(done: int, total: int) -> None:
        progress.done, progress.total = done, total

    return Ticket(told)


def of_collection(name: str, collection: str) -> str:
    """A name, which must be of a collection; the store says what is wrong with it otherwise."""
    if name and not name.startswith(collection):
        raise fields.out_of_range("name", repr(name), f"`{collection}{{id}}`")
    return name
