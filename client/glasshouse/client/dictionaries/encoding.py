"""An encoding as its events come, without transport: rows in pieces in, whole inputs out at the end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.features import EncodedFeatures, indptr_of
from glasshouse.v1.dictionaries_pb2 import EncodedInput, EncodedRows, EncodeFeaturesResponse
from glasshouse.wire.tensors import unpack


class _Open:
    """An input whose rows are coming."""

    def __init__(self, header: EncodedInput) -> None:
        self.header = header
        self.lengths: list[int] = []
        self.ids: list[NDArray[np.int32]] = []
        self.activations: list[NDArray[np.float32]] = []

    @property
    def complete(self) -> bool:
        return len(self.lengths) == len(self.header.positions)

    def add(self, rows: EncodedRows) -> None:
        indptr, ids = unpack(rows.indptr), unpack(rows.feature_ids)
        activations = unpack(rows.activations)
        lengths = np.diff(indptr)
        whole = len(indptr) and indptr[0] == 0 and indptr[-1] == len(ids) == len(activations)
        if rows.first_row != len(self.lengths) or not whole or (lengths < 0).any():
            raise _out_of_protocol(f"rows of input {rows.input} that do not follow the ones before")
        self.lengths += lengths.tolist()
        self.ids.append(ids)
        self.activations.append(activations)

    def result(self, dictionary: str) -> EncodedFeatures:
        return EncodedFeatures(
            positions=np.array(self.header.positions, dtype=np.int64),
            indptr=indptr_of(self.lengths),
            ids=np.concatenate([np.empty(0, np.int32), *self.ids]),
            activations=np.concatenate([np.empty(0, np.float32), *self.activations]),
            dictionary=dictionary,
            token_ids=list(self.header.token_ids),
            tokens=list(self.header.tokens),
        )


class EncodingState:
    """Everything known of one encoding. `dictionary` is the short name its results carry."""

    def __init__(self, dictionary: str, n_inputs: int) -> None:
        self._dictionary = dictionary
        self._n_inputs = n_inputs
        self._inputs: dict[int, _Open] = {}
        self._finished = False

    def feed(self, event: EncodeFeaturesResponse) -> None:
        """Takes in one event. Raises GlasshouseError where the events do not follow the protocol."""
        if event.HasField("rows"):
            if event.rows.input not in self._inputs:
                raise _out_of_protocol(f"rows of input {event.rows.input}, unannounced")
            self._inputs[event.rows.input].add(event.rows)
        elif event.HasField("input"):
            index = event.input.index
            if index in self._inputs or not 0 <= index < self._n_inputs:
                raise _out_of_protocol(f"input {index} twice or unasked")
            self._inputs[index] = _Open(event.input)
        elif event.HasField("finished"):
            self._finished = True

    def result(self) -> list[EncodedFeatures]:
        """Every input, in the order asked; once the stream is over. Raises GlasshouseError where it broke
        off."""
        n_whole = sum(read.complete for read in self._inputs.values())
        if not self._finished or n_whole < self._n_inputs:
            message = f"the stream ended after {n_whole} of {self._n_inputs} inputs"
            raise GlasshouseError(message, code="DATA_LOSS")
        return [self._inputs[index].result(self._dictionary) for index in range(self._n_inputs)]


def _out_of_protocol(what: str) -> GlasshouseError:
    return GlasshouseError(f"the server sent {what}", code="INTERNAL")
