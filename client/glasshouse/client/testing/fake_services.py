"""The services of a fake server: requests in, responses out, no transport."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from glasshouse.client.testing import fake_edits
from glasshouse.client.testing.failures import invalid, refused
from glasshouse.client.testing.fake_model import CONTEXT_LENGTH, EOS, FakeModel, select
from glasshouse.client.testing.fake_probes import FakeCondition, read_probe
from glasshouse.v1 import (
    activations_pb2,
    conditions_pb2,
    generation_pb2,
    inputs_pb2,
    interventions_pb2,
    models_pb2,
    readouts_pb2,
)
from glasshouse.v1.tensors_pb2 import DType
from glasshouse.wire import reasons
from glasshouse.wire.tensors import chunks, pack

PAGE = 3  # Small, so that every client turns pages.


class FakeServices:
    """What each method answers."""

    def __init__(self, models: Sequence[FakeModel], chunk_bytes: int, tokens_per_event: int) -> None:
        self._models = {model.name: model for model in models}
        self._chunk_bytes = chunk_bytes
        self._tokens_per_event = tokens_per_event
        # What monitors say of a generation.
        self.flags: Callable[[generation_pb2.GenerateRequest], list[conditions_pb2.MonitorFlag]] = (
            lambda request: []
        )

    def list_models(self, request: models_pb2.ListModelsRequest) -> models_pb2.ListModelsResponse:
        """A page of models."""
        start, names = int(request.page_token or 0), sorted(self._models)
        page = [self._models[name].info() for name in names[start : start + PAGE]]
        token = str(start + PAGE) if start + PAGE < len(names) else ""
        return models_pb2.ListModelsResponse(models=page, next_page_token=token)

    def get_model(self, request: models_pb2.GetModelRequest) -> models_pb2.GetModelResponse:
        """One model."""
        return models_pb2.GetModelResponse(model=self.model(request.name, "name").info())

    def list_hook_points(
        self, request: models_pb2.ListHookPointsRequest
    ) -> models_pb2.ListHookPointsResponse:
        """A page of hook points."""
        points = self.model(request.model).hook_points()
        start = int(request.page_token or 0)
        token = str(start + PAGE) if start + PAGE < len(points) else ""
        page = points[start : start + PAGE]
        return models_pb2.ListHookPointsResponse(hook_points=page, next_page_token=token)

    def tokenize(self, request: models_pb2.TokenizeRequest) -> models_pb2.TokenizeResponse:
        """Text to tokens."""
        model = self.model(request.model)
        ids = model.token_ids(request.input)
        return models_pb2.TokenizeResponse(token_ids=ids, tokens=model.strings(ids))

    def detokenize(self, request: models_pb2.DetokenizeRequest) -> models_pb2.DetokenizeResponse:
        """Tokens to text."""
        model = self.model(request.model)
        ids = model.token_ids(inputs_pb2.Input(token_ids=request.token_ids))
        return models_pb2.DetokenizeResponse(text=model.text(ids))

    def render_chat(self, request: models_pb2.RenderChatRequest) -> models_pb2.RenderChatResponse:
        """A conversation to text."""
        model = self.model(request.model)
        open_end = not request.HasField("add_generation_prompt") or request.add_generation_prompt
        text = model.render(request.messages, open_end)
        ids = model.token_ids(inputs_pb2.Input(text=text))
        return models_pb2.RenderChatResponse(text=text, token_ids=ids)

    def score(self, request: generation_pb2.ScoreRequest) -> generation_pb2.ScoreResponse:
        """Log-probabilities of a sequence."""
        model = self.model(request.model)
        ids = model.token_ids(request.input)
        salt = fake_edits.salt(model, request.interventions, ids, len(ids))
        logprobs = [np.nan] + [model.logprob(ids[:p], salt) for p in range(1, len(ids))]
        top = []
        if request.top_k:
            rest = [model.top_tokens(ids[:p], request.top_k, salt) for p in range(1, len(ids))]
            top = [readouts_pb2.TopTokens(), *rest]
        return generation_pb2.ScoreResponse(
            token_ids=ids,
            logprobs=pack(np.array(logprobs, dtype=np.float32)),
            top=top,
            receipt=fake_edits.receipt(model, request.interventions, ids, len(ids)),
            tokens=model.strings(ids),
        )

    def extract_activations(
        self, request: activations_pb2.ExtractActivationsRequest
    ) -> Iterator[activations_pb2.ExtractActivationsResponse]:
        """Inputs in reverse order, which a client must not mind."""
        model = self.model(request.model)
        response = activations_pb2.ExtractActivationsResponse
        for field in ("inputs", "hook_points"):
            if not getattr(request, field):
                raise invalid(field, "at least one is needed", reasons.FIELD_REQUIRED)
        names = [model.resolve(name, f"hook_points[{n}]") for n, name in enumerate(request.hook_points)]
        for n, edit in enumerate(request.interventions):
            model.check_edit(edit, f"interventions[{n}]")
        all_ids = [model.token_ids(value, f"inputs[{n}]") for n, value in enumerate(request.inputs)]
        n_tokens = n_bytes = 0
        for index, ids in reversed(list(enumerate(all_ids))):
            selector = request.positions if request.HasField("positions") else None
            positions = select(selector, ids, len(ids))
            header = activations_pb2.ExtractedInput(
                index=index,
                token_ids=ids,
                positions=positions,
                receipt=fake_edits.receipt(model, request.interventions, ids, len(ids)),
                tokens=model.strings(ids),
            )
            yield response(input=header)
            n_tokens += len(ids)
            for hook_point, name in enumerate(names):
                array = fake_edits.read_at(
                    model, name, ids, positions, request.interventions, len(ids), request.dtype
                )
                for piece in chunks(array, self._chunk_bytes):
                    n_bytes += len(piece.data)
                    chunk = activations_pb2.ExtractedChunk(input=index, hook_point=hook_point, piece=piece)
                    yield response(chunk=chunk)
        yield response(finished=activations_pb2.ExtractionFinished(tokens=n_tokens, bytes=n_bytes))

    def generate(self, request: generation_pb2.GenerateRequest) -> Iterator[generation_pb2.GenerateResponse]:
        """The prompt, the tokens, the end."""
        model = self.model(request.model)
        ids = model.token_ids(request.input)
        n_prompt = len(ids)
        if request.max_tokens < 1:
            raise invalid("max_tokens", f"{request.max_tokens} is not positive", reasons.VALUE_OUT_OF_RANGE)
        if n_prompt + request.max_tokens > CONTEXT_LENGTH:
            message = f"{n_prompt} + {request.max_tokens} tokens exceed the context of {CONTEXT_LENGTH}"
            raise invalid("max_tokens", message, reasons.CONTEXT_EXCEEDED, "Ask for fewer tokens")
        for n, edit in enumerate(request.interventions):
            model.check_edit(edit, f"interventions[{n}]")
            fake_edits.conditions([edit], model, f"interventions[{n}]")
        ends = [
            FakeCondition(model, condition, f"abort_when[{n}]")
            for n, condition in enumerate(request.abort_when)
        ]
        greedy = request.sampling.HasField("temperature") and request.sampling.temperature == 0
        seed = request.sampling.seed if request.sampling.HasField("seed") else _seed(request)
        tail = b"" if greedy else str(seed).encode()
        yield from self._prompt_events(model, request, ids)

        decoder, text, sent, held = codecs.getincrementaldecoder("utf-8")("replace"), "", 0, 0
        if request.stop:
            held = max(map(len, request.stop)) - 1
        reason, stop_string = generation_pb2.FINISH_REASON_LENGTH, ""
        batch: list[generation_pb2.GeneratedToken] = []
        abort = None
        for n in range(request.max_tokens):
            abort = fake_edits.abort(ends, ids, n_prompt)
            if abort is not None:
                reason = generation_pb2.FINISH_REASON_ABORTED
                if batch:
                    yield generation_pb2.GenerateResponse(tokens=generation_pb2.TokensEvent(tokens=batch))
                break
            salt = fake_edits.salt(model, request.interventions, ids, n_prompt) + tail
            token_id = model.next_token(ids, n, salt)
            token = self._token(model, request, ids, n_prompt, token_id, salt)
            ids = [*ids, token_id]
            ended = token_id in request.stop_token_ids or (token_id == EOS and not request.ignore_eos)
            if token_id < 256:
                text += decoder.decode(bytes([token_id]))
            found = [(text.index(stop), stop) for stop in request.stop if stop in text]
            if found:
                cut, stop_string = min(found)
                text, ended = text[:cut], True
            reach = max(len(text) - (0 if found else held), sent)
            token.text, sent = text[sent:reach], reach
            batch.append(token)
            if stop_string:
                reason = generation_pb2.FINISH_REASON_STOP_STRING
            elif ended:
                reason = generation_pb2.FINISH_REASON_STOP_TOKEN
            if ended or len(batch) == self._tokens_per_event or n + 1 == request.max_tokens:
                yield generation_pb2.GenerateResponse(tokens=generation_pb2.TokensEvent(tokens=batch))
                batch = []
            if ended:
                break
        n_generated = len(ids) - n_prompt
        usage = generation_pb2.Usage(
            prompt_tokens=n_prompt, generated_tokens=n_generated, total_seconds=0.001
        )
        finished = generation_pb2.FinishedEvent(
            finish_reason=reason,
            stop_string=stop_string,
            trailing_text=text[sent:],
            usage=usage,
            receipt=fake_edits.receipt(
                model, request.interventions, ids[:-1] if n_generated else ids, n_prompt
            ),
            seed=seed,
            abort=abort,
            flags=self.flags(request),
        )
        yield generation_pb2.GenerateResponse(finished=finished)

    def model(self, name: str, field: str = "model") -> FakeModel:
        """The model of that name; without one the only one there is."""
        name = name.removeprefix("models/")
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise refused(
                "NOT_FOUND",
                f"no model {name!r}",
                reason=reasons.MODEL_NOT_FOUND,
                field=field,
                value=name,
                remedy="Use a name that ListModels returns",
                closest=tuple(sorted(self._models)),
            )
        return self._models[name]

    def _prompt_events(
        self, model: FakeModel, request: generation_pb2.GenerateRequest, ids: list[int]
    ) -> Iterator[generation_pb2.GenerateResponse]:
        event = generation_pb2.PromptEvent(token_ids=ids)
        for index, readout in enumerate(request.readouts):
            selector = readout.positions if readout.HasField("positions") else None
            positions = select(selector, ids, len(ids))
            if readout.WhichOneof("what") == "logit_lens":
                top_k = readout.logit_lens.top_k
                top = [model.top_tokens(ids[: p + 1], top_k, b"lens") for p in positions]
                lens = readouts_pb2.TopTokensByPosition(positions=top)
                event.readouts.append(
                    readouts_pb2.PromptReadout(readout=index, positions=positions, logit_lens=lens)
                )
                continue
            if readout.WhichOneof("what") == "probe":
                rows = read_probe(model, readout.probe, ids, positions, f"readouts[{index}]")
                event.readouts.append(
                    readouts_pb2.PromptReadout(readout=index, positions=positions, probe=rows)
                )
                continue
            if readout.WhichOneof("what") == "features":
                yield from self._feature_events(event, model, request, ids, index, positions)
                event = generation_pb2.PromptEvent()
                continue
            what = readout.activations
            name = model.resolve(what.hook_point, f"readouts[{index}].activations.hook_point")
            array = fake_edits.read_at(
                model, name, ids, positions, request.interventions, len(ids), what.dtype
            )
            for piece in chunks(array, self._chunk_bytes):
                first = positions if not piece.byte_offset else ()
                event.readouts.append(
                    readouts_pb2.PromptReadout(readout=index, positions=first, activations=piece)
                )
                if len(event.readouts) > 1:  # Further pieces travel in events of their own.
                    yield generation_pb2.GenerateResponse(prompt=event)
                    event = generation_pb2.PromptEvent()
        if event.token_ids or event.readouts:
            yield generation_pb2.GenerateResponse(prompt=event)

    def _feature_events(
        self,
        event: generation_pb2.PromptEvent,
        model: FakeModel,
        request: generation_pb2.GenerateRequest,
        ids: list[int],
        index: int,
        positions: list[int],
    ) -> Iterator[generation_pb2.GenerateResponse]:
        """A readout of features, a position a piece; `event` carries the first of them."""
        what = request.readouts[index].features
        rows = _features(model, what, ids, positions, request.interventions, len(ids), f"readouts[{index}]")
        for n, row in enumerate(rows or [readouts_pb2.FeatureActivations()]):
            piece = event.readouts.add(readout=index, positions=positions if n == 0 else ())
            piece.features.indptr.extend([0, len(row.feature_ids)] if rows else [0])
            piece.features.feature_ids.extend(row.feature_ids)
            piece.features.activations.extend(row.activations)
            yield generation_pb2.GenerateResponse(prompt=event)
            event = generation_pb2.PromptEvent()

    def _token(
        self,
        model: FakeModel,
        request: generation_pb2.GenerateRequest,
        ids: list[int],
        n_prompt: int,
        token_id: int,
        salt: bytes,
    ) -> generation_pb2.GeneratedToken:
        """The token that follows `ids`, with what was read at the last of them."""
        token = generation_pb2.GeneratedToken(
            position=len(ids), token_id=token_id, logprob=model.logprob(ids, salt)
        )
        if request.top_logprobs:
            token.top_logprobs.CopyFrom(model.top_tokens(ids, request.top_logprobs, salt))
        position = len(ids) - 1
        for index, readout in enumerate(request.readouts):
            selector = readout.positions if readout.HasField("positions") else None
            if position not in select(selector, ids, n_prompt):
                continue
            if readout.WhichOneof("what") == "logit_lens":
                top = model.top_tokens(ids, readout.logit_lens.top_k, b"lens")
                token.readouts.append(readouts_pb2.ReadoutValue(readout=index, logit_lens=top))
                continue
            if readout.WhichOneof("what") == "probe":
                scores = read_probe(model, readout.probe, ids, [position], f"readouts[{index}]").scores
                token.readouts.add(readout=index).probe.scores.extend(scores)
                continue
            if readout.WhichOneof("what") == "features":
                what, edits = readout.features, request.interventions
                (row,) = _features(model, what, ids, [position], edits, n_prompt, f"readouts[{index}]")
                token.readouts.append(readouts_pb2.ReadoutValue(readout=index, features=row))
                continue
            name = model.resolve(readout.activations.hook_point, f"readouts[{index}]")
            dtype = readout.activations.dtype
            rows = fake_edits.read_at(model, name, ids, [position], request.interventions, n_prompt, dtype)
            value = rows[0] if name in model.residual else rows[:, 0]
            token.readouts.append(readouts_pb2.ReadoutValue(readout=index, activations=pack(value)))
        return token


def _features(
    model: FakeModel,
    what: readouts_pb2.ReadFeatures,
    ids: Sequence[int],
    positions: Sequence[int],
    interventions: Sequence[interventions_pb2.Intervention],
    n_prompt: int,
    field: str,
) -> list[readouts_pb2.FeatureActivations]:
    """A dictionary's features at some positions, as they are asked for."""
    dictionary = model.dictionary(what.dictionary, f"{field}.features.dictionary")
    dictionary.check_features(what.features, f"{field}.features.features")
    rows = fake_edits.read_at(
        model, dictionary.hook_point, ids, positions, interventions, n_prompt, DType.DTYPE_F32
    )
    return dictionary.chosen(rows, what.top_k if what.HasField("top_k") else 8, what.features)


def _seed(request: generation_pb2.GenerateRequest) -> int:
    """A seed where none is asked for: the request's own, so that a test that passes once passes always."""
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
    return int.from_bytes(digest[:7], "little")
