"""One generation in progress: its transcript, and what this engine keeps beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from glasshouse.server.engines.aborting import AbortCondition, AbortConditions
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
        abort_when: Sequence[AbortCondition] = (),
    ) -> None:
        self.request = request
        self._abort_when = AbortConditions(abort_when)
        self._own_edits, self.readouts = edits, (*readouts, *self._abort_when.readouts)
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

    def piece_fed(self, readouts: Callable[[], tuple[PromptReadout, ...]]) -> bool:
        """A piece of its prompt, not the last, has been fed; returns whether it goes on. `readouts`: those so far."""
        abort = None if self.watch is None else self.watch.abort
        if abort is None and self._abort_when.readouts:
            abort = self._abort_when.over_prompt(readouts(), complete=False)
        if abort is None:
            return True
        self._transcript.prefilled(tuple(readout for readout in readouts() if readout.readout >= 0))
        return self._end(self._transcript.aborted(abort))

    def prefilled(self, readouts: tuple[PromptReadout, ...]) -> bool:
        """Its prompt has been fed; returns whether the generation goes on."""
        self._transcript.prefilled(tuple(readout for readout in readouts if readout.readout >= 0))
        abort = self._abort_when.over_prompt(readouts)
        return not self.stream.ended if abort is None else self._end(self._transcript.aborted(abort))

    def push(
        self,
        token_id: int,
        logprob: float,
        top: TopTokens | None,
        readouts: Mapping[int, ReadoutValue],
    ) -> bool:
        """Takes the next token; returns whether the generation goes on. A `logprob` of NaN: the logits are not finite.

        Where a watch or a condition has ended the generation at the position just fed, the token is not taken.
        """
        watch, transcript = self.watch, self._transcript
        abort = None if watch is None else watch.abort
        # The prompt's positions have been asked already.
        if abort is None and transcript.n_generated:
            abort = self._abort_when.at(self.n_prompt + transcript.n_generated - 1, readouts)
        if abort is not None:
            return self._end(transcript.aborted(abort))
        try:
            ending = transcript.push(token_id, logprob, top, self._abort_when.without(readouts))
        except ServingError as error:
            self.stream.fail(error)
            return False
        if ending is not None:
            return self._end(ending)
        if watch is not None and watch.wants_text:
            watch.generated.append(token_id)
        return not self.stream.ended

    def _end(self, ending: Ending) -> bool:
        watch = self.watch
        flags = () if watch is None else tuple(watch.flags)
        try:
            if watch is not None:
                # Nothing is reported of them, but they too are applied wherever they are due.
                receipt(watch.all_edits)
            self._transcript.finish(ending, receipt(self._own_edits), flags=flags)
        except ServingError as error:
            self.stream.fail(error)
            return False
        self.stream.end()
        return False
