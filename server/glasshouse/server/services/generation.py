"""GenerationService: steered, read generation as a stream, and teacher-forced scoring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import perf_counter

from glasshouse.server.engines.watching import RequestWatch
from glasshouse.server.monitors.room import MonitorRoom
from glasshouse.server.monitors.spec import Subject, check_labels
from glasshouse.server.types.configuration import StreamSettings
from glasshouse.server.types.generation import (
    Finished,
    GenerationRequest,
    NewToken,
    Prefilled,
    ScoreRequest,
)
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import generation_pb2 as pb

from . import fields, parameters, scores
from .call import Call
from .catalogue import Catalogue, ServedModel
from .conditions import abort_conditions, flag_trailers
from .events import TokenMessages, finished_message, prompt_messages
from .inputs import InputReader
from .interventions import interventions
from .pacing import Pace
from .readouts import readouts

# Of so many tokens, strings are made on the event loop; of more, in a thread.
_INLINE_ENTRIES = 4096


class GenerationServicer:
    """Serves `glasshouse.v1.GenerationService`."""

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits,
        streams: StreamSettings,
        monitors: MonitorRoom | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._limits = limits
        self._monitors = monitors
        self._streams = streams

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> AsyncIterator[pb.GenerateResponse]:
        """The prompt, tokens as they come, the end. Closing the iterator frees the request's place."""
        model = self._catalogue.find(request.model, "model")
        wanted = await self._request(request, model, call)
        pack = TokenMessages(model.strings, self._limits.max_message_bytes).pack
        pace = Pace(self._streams, model.tempo, wanted.max_tokens)
        watch = self._watch(request, model, call)
        events = model.engine.generate(wanted) if watch is None else model.engine.generate(wanted, watch)
        async with aclosing(events) as batches:
            async for batch in batches:
                if not batch:
                    continue
                tokens = [event for event in batch if type(event) is NewToken]
                if len(tokens) != len(batch) and isinstance(batch[0], Prefilled):
                    call.accepted(len(wanted.prompt), [i.edit.kind for i in wanted.interventions])
                    for message, n_bytes in prompt_messages(wanted.prompt, batch[0].readouts, model.strings):
                        if n_bytes:
                            call.read(n_bytes)
                        yield message
                if tokens:
                    call.generated(len(tokens))
                    for message, _, n_bytes in pack(tokens):
                        if n_bytes:
                            call.read(n_bytes)
                        yield message
                if isinstance(batch[-1], Finished):
                    call.trailing += flag_trailers(batch[-1].flags)
                    yield finished_message(batch[-1], wanted.sampling.seed)
                    return
                if tokens:
                    pause_s = pace.pause_s(len(tokens), call.meter.open_streams, perf_counter())
                    if pause_s:
                        await asyncio.sleep(pause_s)

    async def Score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        """Log-probabilities of one input."""
        model = self._catalogue.find(request.model, "model")
        top_k = parameters.top_logprobs(request.top_k, "top_k", self._limits)
        edits = interventions(request.interventions, self._limits)
        tokens = await InputReader(model, self._limits).prompt(
            request.input, request.HasField("input"), "input"
        )
        most, vocab_size = self._limits.max_message_bytes, model.engine.info.vocab_size
        if scores.may_be_large(len(tokens), top_k, most):
            await asyncio.to_thread(
                scores.check_size, tokens, top_k, len(edits), model.strings, vocab_size, most
            )
        result = await model.engine.score(
            ScoreRequest(tokens=tokens, interventions=edits, top_k=top_k, request_id=call.request_id)
        )
        call.accepted(len(tokens), [edit.edit.kind for edit in edits])
        if len(tokens) * (top_k + 1) <= _INLINE_ENTRIES:
            response = scores.score_message(tokens, result, model.strings)
        else:
            response = await asyncio.to_thread(scores.score_message, tokens, result, model.strings)
        scores.check_answer(response, top_k, most)
        return response

    async def _request(
        self, request: pb.GenerateRequest, model: ServedModel, call: Call
    ) -> GenerationRequest:
        """The request, checked as far as its own fields, the tokenizer and the server's limits go."""
        limits = self._limits
        reader = InputReader(model, limits)
        max_tokens = parameters.max_tokens(request.max_tokens)
        sampling = parameters.sampling(request.sampling)
        stop = parameters.stops(request.stop)
        stop_token_ids = parameters.stop_tokens(request.stop_token_ids)
        reader.check_ids(stop_token_ids, "stop_token_ids")
        top_logprobs = parameters.top_logprobs(request.top_logprobs, "top_logprobs", limits)
        edits = interventions(request.interventions, limits)
        wanted = readouts(request.readouts, limits)
        abort_when = abort_conditions(request.abort_when, limits)
        prompt = await reader.prompt(request.input, request.HasField("input"), "input")
        reader.check_fits(len(prompt), max_tokens, "input")
        fields.count(max_tokens, "max_tokens", limits.max_tokens, "max_tokens", "tokens to generate")
        return GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=request.ignore_eos,
            top_logprobs=top_logprobs,
            interventions=edits,
            readouts=wanted,
            abort_when=abort_when,
            request_id=call.request_id,
        )

    def _watch(self, request: pb.GenerateRequest, model: ServedModel, call: Call) -> RequestWatch | None:
        """The monitors that look at the request."""
        labels = dict(request.labels)
        check_labels(labels, "labels")
        if self._monitors is None:
            return None
        subject = Subject(
            request_id=call.request_id,
            key=call.caller,
            labels=labels,
            tell_text=self._monitors.may_tell(request.allow_text_in_events),
        )
        return self._monitors.attach(model.engine.info.name, subject)
