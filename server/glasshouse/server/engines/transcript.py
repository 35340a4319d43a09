"""What a generation says, token by token: its text, its stop strings, its end. Both engines' generations are one of these.

The engine gives it tokens with what was read at them; it makes the events, says when the generation is over, and refuses
logits that are not finite. The receipt comes from the engine, which may have it later than the last token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.types.conditions import Abort, MonitorFlag
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.generation import (
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    NewToken,
    Prefilled,
    Usage,
)
from glasshouse.server.types.interventions import InterventionReceipt
from glasshouse.server.types.readouts import (
    FeatureActivations,
    FeatureRows,
    ProbeScoreRows,
    ProbeScores,
    PromptReadout,
    ReadoutValue,
    TopTokens,
)
from glasshouse.wire import reasons

# Takes an event and the bytes of readouts in it.
Put = Callable[[GenerationEvent, int], None]


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


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a generation ended: the last event but for the receipt."""

    reason: FinishReason
    stop_string: str
    trailing_text: str
    abort: Abort | None = None


class Transcript:
    """A generation's events from its request to its end, put in order."""

    def __init__(
        self, request: GenerationRequest, *, codec: TextCodec, eos_token_ids: Sequence[int], put: Put
    ) -> None:
        self.request = request
        self.last_token = -1
        self.n_generated = 0
        self._put = put
        self._decoder = codec.stream_decoder()
        self._stops = StopStrings(request.stop)
        self.end_tokens = end_tokens(request, eos_token_ids)
        self._arrived = time.perf_counter()
        self._started = self._first_token = 0.0

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    def started(self) -> None:
        """Its first pass begins."""
        if not self._started:
            self._started = time.perf_counter()

    def prefilled(self, readouts: tuple[PromptReadout, ...]) -> None:
        """Its prompt has been fed."""
        self._put(Prefilled(readouts=readouts), sum(n_bytes(readout.values) for readout in readouts))

    def push(
        self, token_id: int, logprob: float, top: TopTokens | None, readouts: Mapping[int, ReadoutValue]
    ) -> Ending | None:
        """Takes the next token; returns the ending where it was the last. `readouts`: what was read before it.

        Raises:
            FailedPrecondition: a `logprob` of NaN, which says that the logits are not finite.
        """
        position = self.n_prompt + self.n_generated
        if math.isnan(logprob):
            raise _not_finite(position, bool(self.request.interventions))
        self.n_generated += 1
        self.last_token = token_id
        ends = token_id in self.end_tokens
        text, stop = ("", "") if ends else self._stops.push(self._decoder.push(token_id))
        self._put(
            NewToken(
                position=position,
                token_id=token_id,
                text=text,
                logprob=logprob,
                top_logprobs=top,
                readouts=readouts,
            ),
            sum(n_bytes(value) for value in readouts.values()) if readouts else 0,
        )
        if self.n_generated == 1:
            self._first_token = time.perf_counter()
        if ends:
            return self._ending(FinishReason.STOP_TOKEN, "")
        if stop:
            return self._ending(FinishReason.STOP_STRING, stop)
        if self.n_generated == self.request.max_tokens:
            return self._ending(FinishReason.LENGTH, "")
        return None

    def aborted(self, abort: Abort) -> Ending:
        """The ending of a generation that goes no further: the token that was due is not taken."""
        return replace(self._ending(FinishReason.ABORTED, ""), reason=FinishReason.ABORTED, abort=abort)

    def finish(
        self, ending: Ending, receipt: tuple[InterventionReceipt, ...], flags: tuple[MonitorFlag, ...] = ()
    ) -> None:
        """Puts the last event."""
        usage = Usage(
            prompt_tokens=self.n_prompt,
            generated_tokens=self.n_generated,
            queue_s=self._started - self._arrived,
            time_to_first_token_s=self._first_token - self._arrived if self._first_token else 0.0,
            total_s=time.perf_counter() - self._arrived,
        )
        self._put(
            Finished(
                reason=ending.reason,
                stop_string=ending.stop_string,
                trailing_text=ending.trailing_text,
                usage=usage,
                receipt=receipt,
                seed=self.request.sampling.seed,
                abort=ending.abort,
                flags=flags,
            ),
            0,
        )

    def _ending(self, reason: FinishReason, stop: str) -> Ending:
        trailing = ""
        if not stop:
            rest, stop = self._stops.push(self._decoder.finish())
            trailing = rest + self._stops.finish()
            if stop:
                reason = FinishReason.STOP_STRING
        return Ending(reason=reason, stop_string=stop, trailing_text=trailing)


def end_tokens(request: GenerationRequest, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """The tokens that end a generation."""
    ends = frozenset(request.stop_token_ids)
    return ends if request.ignore_eos else ends.union(eos_token_ids)


def n_bytes(values: object) -> int:
    """Bytes of what was read."""
    if isinstance(values, tuple):
        return sum(n_bytes(value) for value in values)
    if isinstance(values, TopTokens):
        return values.token_ids.nbytes + values.logprobs.nbytes
    if isinstance(values, FeatureActivations | FeatureRows):
        return values.ids.nbytes + values.activations.nbytes
    if isinstance(values, ProbeScores | ProbeScoreRows):
        return values.scores.nbytes
    return int(getattr(values, "nbytes", 0))


def _not_finite(position: int, edited: bool) -> FailedPrecondition:
    remedy = "use smaller coefficients" if edited else "serve the model in float32"
    return FailedPrecondition(
        f"the model's logits for position {position} are not finite",
        reason=reasons.LOGITS_NOT_FINITE,
        field="interventions" if edited else "",
        value=position,
        remedy=remedy,
    )
