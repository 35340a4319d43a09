"""A scoring as its events come, without transport: each input's scores, in the order of the inputs at the end."""

from __future__ import annotations

from glasshouse.client.concepts.values import ProbeScores
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.v1.probes_pb2 import ScoredInput, ScoreProbeResponse
from glasshouse.wire.tensors import unpack


class ScoringState:
    """Everything known of one scoring."""

    def __init__(self, n_inputs: int) -> None:
        self._n_inputs = n_inputs
        self._found: dict[int, ScoredInput] = {}
        self._columns: list[str] | None = None

    def feed(self, event: ScoreProbeResponse) -> None:
        """Takes in one event. Raises GlasshouseError where they do not follow the protocol."""
        if event.HasField("finished"):
            self._columns = list(event.finished.columns)
        elif event.HasField("scored"):
            index = event.scored.index
            if index in self._found or not 0 <= index < self._n_inputs:
                raise GlasshouseError(f"the server sent input {index} twice or unasked", code="INTERNAL")
            self._found[index] = event.scored

    def result(self) -> list[ProbeScores]:
        """The inputs' scores, once the stream is over. Raises GlasshouseError where it broke off."""
        if self._columns is None or len(self._found) < self._n_inputs:
            message = f"the stream ended after {len(self._found)} of {self._n_inputs} inputs"
            raise GlasshouseError(message, code="DATA_LOSS")
        return [
            ProbeScores(
                scores=unpack(scored.scores),
                columns=self._columns,
                positions=list(scored.positions),
                token_ids=list(scored.token_ids),
                tokens=list(scored.tokens),
            )
            for _, scored in sorted(self._found.items())
        ]
