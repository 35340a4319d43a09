"""One generation in progress: its transcript, and what this engine keeps beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glasshouse.server.engines.preparation import receipt
from glasshouse.server.engines.transcript import Transcript
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.errors import ServingError
from glasshouse.server.types.generation import GenerationEvent, GenerationRequest
from glasshouse.server.types.readouts import PromptReadout, ReadoutValue, TopTokens

from .sampler import RowSampler
from .stream import EventStream


class GenerationRow:
    """A generation from admission to its end. Lives in the engine's thread."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        edits: tuple[PreparedIntervention, ...],
        readouts: tuple[PreparedReadout, ...],
        codec: TextCodec,
        eos_token_ids: Sequence[int],
        stream: EventStream[GenerationEvent],
    ) -> None:
        self.request = request
        self.edits, self.readouts = edits, readouts
        self.stream = stream
        self.sampler = RowSampler(request.sampling)
        self._transcript = Transcript(request, codec=codec, eos_token_ids=eos_token_ids, put=stream.put)

    @property
    def last_token(self) -> int:
        """The token it feeds next."""
        return self._transcript.last_token

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def n_reserved(self) -> int:
        """Positions it may come to cache."""
        return self.n_prompt + self.request.max_tokens - 1

    def started(self) -> None:
        """Its first pass begins."""
        self._transcript.started()

    def prefilled(self, readouts: tuple[PromptReadout, ...]) -> None:
        """Its prompt has been fed."""
        self._transcript.prefilled(readouts)

    def push(
        self,
        token_id: int,
        logprob: float,
        top: TopTokens | None,
        readouts: Mapping[int, ReadoutValue],
    ) -> bool:
        """Takes the next token; returns whether the generation goes on. A `logprob` of NaN: the logits are not finite."""
        try:
            ending = self._transcript.push(token_id, logprob, top, readouts)
            if ending is None:
                return not self.stream.ended
            self._transcript.finish(ending, receipt(self.edits))
        except ServingError as error:
            self.stream.fail(error)
            return False
        self.stream.end()
        return False
