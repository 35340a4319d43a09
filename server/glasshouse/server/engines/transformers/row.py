"""One generation in progress: its tokens, its text, and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from glasshouse.server.engines.preparation import receipt
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.errors import FailedPrecondition, ServingError
from glasshouse.server.types.generation import (
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    NewToken,
    Prefilled,
    Usage,
)
from glasshouse.server.types.readouts import (
    FeatureActivations,
    FeatureRows,
    PromptReadout,
    ReadoutValue,
    TopTokens,
)
from glasshouse.wire import reasons

from .sampler import RowSampler
from .stream import EventStream


class StopStrings:
    """Finds the first stop string in text that comes in pieces, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""

    def push(self, text: str) -> tuple[str, str]:
        """The text that is certain now, and the stop string that was found or ""."""
        if not self._stops:
            return text, ""
        self._pending += text
        found = [(at, stop) for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            printable, self._pending = self._pending[:at], ""
            return printable, stop
        held = self._held()
        cut = len(self._pending) - held
        printable, self._pending = self._pending[:cut], self._pending[cut:]
        return printable, ""

    def finish(self) -> str:
        """What was held back."""
        pending, self._pending = self._pending, ""
        return pending

    def _held(self) -> int:
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(self._pending)), 0, -1):
            tail = self._pending[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


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
        self.last_token = -1
        self.n_generated = 0
        self._decoder = codec.stream_decoder()
        self._stops = StopStrings(request.stop)
        ends = set(request.stop_token_ids)
        self._end_tokens = frozenset(ends if request.ignore_eos else ends.union(eos_token_ids))
        self._arrived = time.perf_counter()
        self._started = self._first_token = 0.0

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
        if not self._started:
            self._started = time.perf_counter()

    def prefilled(self, readouts: tuple[PromptReadout, ...]) -> None:
        """Its prompt has been fed."""
        self.stream.put(Prefilled(readouts=readouts), sum(_n_bytes(readout.values) for readout in readouts))

    def push(
        self,
        token_id: int,
        logprob: float,
        top: TopTokens | None,
        readouts: Mapping[int, ReadoutValue],
    ) -> bool:
        """Takes the next token; returns whether the generation goes on. A `logprob` of NaN: the logits are not finite."""
        if math.isnan(logprob):
            self.stream.fail(_not_finite(self.n_prompt + self.n_generated, bool(self.edits)))
            return False
        position = self.n_prompt + self.n_generated
        self.n_generated += 1
        self.last_token = token_id
        ends = token_id in self._end_tokens
        text, stop = ("", "") if ends else self._stops.push(self._decoder.push(token_id))
        self.stream.put(
            NewToken(
                position=position,
                token_id=token_id,
                text=text,
                logprob=logprob,
                top_logprobs=top,
                readouts=readouts,
            ),
            sum(_n_bytes(value) for value in readouts.values()) if readouts else 0,
        )
        if self.n_generated == 1:
            self._first_token = time.perf_counter()
        if ends:
            self._finish(FinishReason.STOP_TOKEN, "")
        elif stop:
            self._finish(FinishReason.STOP_STRING, stop)
        elif self.n_generated == self.request.max_tokens:
            self._finish(FinishReason.LENGTH, "")
        return not self.stream.ended

    def _finish(self, reason: FinishReason, stop: str) -> None:
        trailing = ""
        if not stop:
            rest, stop = self._stops.push(self._decoder.finish())
            trailing = rest + self._stops.finish()
            if stop:
                reason = FinishReason.STOP_STRING
        now = time.perf_counter()
        try:
            done = receipt(self.edits)
        except ServingError as error:
            self.stream.fail(error)
            return
        usage = Usage(
            prompt_tokens=self.n_prompt,
            generated_tokens=self.n_generated,
            queue_s=self._started - self._arrived,
            time_to_first_token_s=self._first_token - self._arrived,
            total_s=now - self._arrived,
        )
        self.stream.put(
            Finished(
                reason=reason,
                stop_string=stop,
                trailing_text=trailing,
                usage=usage,
                receipt=done,
                seed=self.request.sampling.seed,
            )
        )
        self.stream.end()


def _not_finite(position: int, edited: bool) -> FailedPrecondition:
    remedy = "use smaller coefficients" if edited else "serve the model in float32"
    return FailedPrecondition(
        f"the model's logits for position {position} are not finite",
        reason=reasons.LOGITS_NOT_FINITE,
        field="interventions" if edited else "",
        value=position,
        remedy=remedy,
    )


def _n_bytes(values: object) -> int:
    if isinstance(values, tuple):
        return sum(_n_bytes(value) for value in values)
    if isinstance(values, TopTokens):
        return values.token_ids.nbytes + values.logprobs.nbytes
    if isinstance(values, FeatureActivations | FeatureRows):
        return values.ids.nbytes + values.activations.nbytes
    return int(getattr(values, "nbytes", 0))
