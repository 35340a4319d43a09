"""One generation in progress: its transcript, and what this engine keeps beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glasshouse.server.engines.preparation import receipt
from glasshouse.server.engines.transcript import Ending, Transcript
from glasshouse.server.engines.watching import RequestWatch
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
        watch: RequestWatch | None = None,
    ) -> None:
        self.request = request
        self._own_edits, self.readouts = edits, readouts
        self.watch = watch
        self.stream = stream
        self.sampler = RowSampler(request.sampling)
        self._transcript = Transcript(request, codec=codec, eos_token_ids=eos_token_ids, put=stream.put)

    @property
    def edits(self) -> tuple[PreparedIntervention, ...]:
        """The edits in force: the request's own, then those of the watches that steer it."""
        return self._own_edits if self.watch is None else (*self._own_edits, *self.watch.edits)

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
        if self.watch is not None:
            self.watch.begin(self.request.prompt)
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
        """Takes the next token; returns whether the generation goes on. A `logprob` of NaN: the logits are not finite.

        Where a watch has ended the generation at the position just fed, the token is not taken.
        """
        watch = self.watch
        try:
            if watch is not None and watch.abort is not None:
                ending: Ending | None = self._transcript.aborted(watch.abort)
            else:
                ending = self._transcript.push(token_id, logprob, top, readouts)
            if ending is None:
                if watch is not None and watch.wants_text:
                    watch.generated.append(token_id)
                return not self.stream.ended
            flags = () if watch is None else tuple(watch.flags)
            if watch is not None:
                # Nothing is reported of them, but they too are applied wherever they are due.
                receipt(watch.all_edits)
            self._transcript.finish(ending, receipt(self._own_edits), flags=flags)
        except ServingError as error:
            self.stream.fail(error)
            return False
        self.stream.end()
        return False
