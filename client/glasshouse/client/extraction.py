"""An extraction as its events come, without transport: pieces in, whole inputs out as each completes."""

from __future__ import annotations

from collections.abc import Sequence

from glasshouse.client import parsers
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.results import Activations, Progress
from glasshouse.v1.activations_pb2 import ExtractActivationsResponse, ExtractedChunk, ExtractedInput
from glasshouse.wire.tensors import TensorAssembler


class _Open:
    """An input whose tensors are still coming."""

    def __init__(self, header: ExtractedInput, n_hook_points: int) -> None:
        self.header = header
        self.tensors = [TensorAssembler() for _ in range(n_hook_points)]
        self.missing = n_hook_points


class ExtractionState:
    """Everything known of one extraction. Holds only inputs that are not complete."""

    def __init__(self, hook_points: Sequence[str], n_inputs: int) -> None:
        self._hook_points = list(hook_points)
        self._n_inputs = n_inputs
        self._open: dict[int, _Open] = {}
        self._done: set[int] = set()
        self._bytes_received = 0
        self._finished = False

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        return Progress(self._bytes_received, len(self._done), self._n_inputs)

    def feed(self, event: ExtractActivationsResponse) -> tuple[int, Activations] | None:
        """Takes in one event; the index and the activations of the input it completes, if it does.

        Raises GlasshouseError where the events do not follow the protocol, TensorError for damaged tensors.
        """
        if event.HasField("chunk"):
            return self._feed_chunk(event.chunk)
        if event.HasField("input"):
            index = event.input.index
            if index in self._open or index in self._done or not 0 <= index < self._n_inputs:
                raise _out_of_protocol(f"input {index} twice or unasked")
            self._open[index] = _Open(event.input, len(self._hook_points))
        elif event.HasField("finished"):
            self._finished = True
        return None

    def end(self) -> None:
        """The stream is over. Raises GlasshouseError where it broke off."""
        if not self._finished or len(self._done) < self._n_inputs:
            message = f"the stream ended after {len(self._done)} of {self._n_inputs} inputs"
            raise GlasshouseError(message, code="DATA_LOSS")

    def _feed_chunk(self, chunk: ExtractedChunk) -> tuple[int, Activations] | None:
        index = chunk.input
        being_read = self._open.get(index)
        if being_read is None or not 0 <= chunk.hook_point < len(self._hook_points):
            raise _out_of_protocol(f"a piece of hook point {chunk.hook_point} of input {index}, unannounced")
        tensor = being_read.tensors[chunk.hook_point]
        before = tensor.received_bytes
        complete = tensor.add(chunk.piece)
        self._bytes_received += tensor.received_bytes - before
        if not complete:
            return None
        being_read.missing -= 1
        if being_read.missing:
            return None
        del self._open[index]
        self._done.add(index)
        header = being_read.header
        arrays = {
            name: part.result() for name, part in zip(self._hook_points, being_read.tensors, strict=True)
        }
        activations = Activations(
            arrays,
            token_ids=list(header.token_ids),
            tokens=list(header.tokens),
            positions=list(header.positions),
            receipt=parsers.receipt(header.receipt),
        )
        return index, activations


def _out_of_protocol(what: str) -> GlasshouseError:
    return GlasshouseError(f"the server sent {what}", code="INTERNAL")
