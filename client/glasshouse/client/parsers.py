"""Response messages -> results. Pure functions; kept small where they run once a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Generic, TypeVar

import numpy as np

from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.features import FeatureActivations
from glasshouse.client.probe_readings import ProbeReading
from glasshouse.client.results import (
    NONE,
    Abort,
    GeneratedToken,
    HookPointInfo,
    InterventionReceipt,
    ModelInfo,
    MonitorFlag,
    RenderedChat,
    Score,
    Tokens,
    TopTokens,
    Usage,
)
from glasshouse.v1 import conditions_pb2, generation_pb2, interventions_pb2, models_pb2, readouts_pb2
from glasshouse.wire.tensors import unpack

T = TypeVar("T")

_PREFIX: Final = "models/"

FINISH_REASONS: Final[dict[int, str]] = {
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_STOP_TOKEN: "stop_token",
    generation_pb2.FINISH_REASON_STOP_STRING: "stop_string",
    generation_pb2.FINISH_REASON_ABORTED: "aborted",
}
_ACTIONS: Final[dict[int, str]] = {
    conditions_pb2.MONITOR_ACTION_OBSERVE: "observe",
    conditions_pb2.MONITOR_ACTION_FLAG: "flag",
    conditions_pb2.MONITOR_ACTION_STEER: "steer",
    conditions_pb2.MONITOR_ACTION_ABORT: "abort",
}


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; an empty token means the end."""

    items: list[T]
    next_page_token: str


def resource_name(model: str) -> str:
    """`models/{model}` from either form."""
    return model if model.startswith(_PREFIX) else _PREFIX + model


def model_page(response: models_pb2.ListModelsResponse) -> Page[ModelInfo]:
    """A page of ListModels."""
    return Page([_model_info(model) for model in response.models], response.next_page_token)


def model(response: models_pb2.GetModelResponse) -> ModelInfo:
    """The model of GetModel."""
    return _model_info(response.model)


def _model_info(message: models_pb2.Model) -> ModelInfo:
    return ModelInfo(
        name=message.name.removeprefix(_PREFIX),
        family=message.family,
        n_layers=message.n_layers,
        d_model=message.d_model,
        n_heads=message.n_heads,
        n_kv_heads=message.n_kv_heads,
        d_head=message.d_head,
        d_mlp=message.d_mlp,
        vocab_size=message.vocab_size,
        context_length=message.context_length,
        dtype=message.dtype,
        device=message.device,
        engine=message.engine,
        has_chat_template=message.has_chat_template,
        eos_token_ids=list(message.eos_token_ids),
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        capabilities=list(message.capabilities),
    )


def hook_point_page(response: models_pb2.ListHookPointsResponse) -> Page[HookPointInfo]:
    """A page of ListHookPoints."""
    items = [
        HookPointInfo(
            name=point.name,
            module_path=point.module_path,
            width=point.width,
            readable=point.readable,
            writable=point.writable,
            layer=point.layer if point.HasField("layer") else None,
            n_heads=point.n_heads,
            note=point.note,
        )
        for point in response.hook_points
    ]
    return Page(items, response.next_page_token)


def tokens(response: models_pb2.TokenizeResponse) -> Tokens:
    """The tokens of Tokenize."""
    return Tokens(list(response.token_ids), list(response.tokens))


def text(response: models_pb2.DetokenizeResponse) -> str:
    """The text of Detokenize."""
    return response.text


def rendered_chat(response: models_pb2.RenderChatResponse) -> RenderedChat:
    """The text and tokens of RenderChat."""
    return RenderedChat(response.text, list(response.token_ids))


def score(response: generation_pb2.ScoreResponse) -> Score:
    """The log-probabilities of Score."""
    return Score(
        token_ids=list(response.token_ids),
        logprobs=unpack(response.logprobs),
        top=[top_tokens(entry) for entry in response.top],
        tokens=list(response.tokens),
        receipt=receipt(response.receipt),
    )


def top_tokens(message: readouts_pb2.TopTokens) -> TopTokens:
    """The likeliest tokens at one position."""
    return TopTokens(list(message.token_ids), list(message.logprobs), list(message.tokens))


def receipt(messages: Iterable[interventions_pb2.InterventionReceipt]) -> list[InterventionReceipt]:
    """What was done, one entry an intervention."""
    return [
        InterventionReceipt(
            index=message.index,
            edit=message.edit,
            hook_point=message.hook_point,
            positions_applied=message.positions_applied,
            hook_points=list(message.hook_points),
            content_hash=message.content_hash,
            positions_steered=message.positions_steered,
            resources=list(message.resources),
        )
        for message in messages
    ]


def usage(message: generation_pb2.Usage) -> Usage:
    """What a generation took."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        generated_tokens=message.generated_tokens,
        queue_seconds=message.queue_seconds,
        time_to_first_token_seconds=message.time_to_first_token_seconds,
        total_seconds=message.total_seconds,
    )


def abort(message: generation_pb2.FinishedEvent) -> Abort | None:
    """What ended a generation before its time."""
    if not message.HasField("abort"):
        return None
    ended = message.abort
    return Abort(
        condition=ended.condition if ended.HasField("condition") else None,
        monitor=ended.monitor,
        position=ended.position,
        score=ended.score,
        threshold=ended.threshold,
    )


def flags(messages: Iterable[conditions_pb2.MonitorFlag]) -> list[MonitorFlag]:
    """The monitors that passed their threshold."""
    return [
        MonitorFlag(
            monitor=message.monitor,
            position=message.position,
            score=message.score,
            threshold=message.threshold,
            action=_ACTIONS.get(message.action, "unknown"),
        )
        for message in messages
    ]


def feature_activations(message: readouts_pb2.FeatureActivations) -> FeatureActivations:
    """Features at one position."""
    return FeatureActivations(
        np.array(message.feature_ids, dtype=np.int32), np.array(message.activations, dtype=np.float32)
    )


def feature_rows(message: readouts_pb2.FeatureRows) -> list[FeatureActivations]:
    """Features of several positions, one entry each. Raises GlasshouseError for rows that do not hold together."""
    ids = np.array(message.feature_ids, dtype=np.int32)
    activations = np.array(message.activations, dtype=np.float32)
    ends = list(message.indptr)
    if not ends or ends[0] or ends[-1] != len(ids) or len(ids) != len(activations) or sorted(ends) != ends:
        raise GlasshouseError("the server sent features whose rows do not hold together", code="INTERNAL")
    return [FeatureActivations(ids[low:high], activations[low:high]) for low, high in pairwise(ends)]


def generated_token(
    message: generation_pb2.GeneratedToken,
    names: Sequence[str],
    labels: Mapping[int, Sequence[str]] | None = None,
) -> GeneratedToken:
    """A new token. names: what each of the request's readouts is found under; labels: the columns of those of probes."""
    top = top_tokens(message.top_logprobs) if message.HasField("top_logprobs") else None
    values = message.readouts
    if not values:
        return GeneratedToken(
            message.position, message.token_id, message.text, message.logprob, NONE, NONE, NONE, top
        )
    activations: dict[str, Any] = {}
    features: dict[str, FeatureActivations] = {}
    probes: dict[str, ProbeReading] = {}
    logit_lens: dict[str, TopTokens] = {}
    for value in values:
        kind = value.WhichOneof("value")
        name = names[value.readout]
        if kind == "activations":
            activations[name] = unpack(value.activations)
        elif kind == "logit_lens":
            logit_lens[name] = top_tokens(value.logit_lens)
        elif kind == "features":
            here = feature_activations(value.features)
            features[name] = features[name].joined(here) if name in features else here
        elif kind == "probe":
            columns, scores = (labels or {}).get(value.readout, ()), value.probe.scores
            if len(columns) != len(scores):
                raise GlasshouseError("the server sent scores without their labels", code="INTERNAL")
            probes[name] = ProbeReading(columns, np.fromiter(scores, np.float32, len(columns)))
    return GeneratedToken(
        position=message.position,
        token_id=message.token_id,
        text=message.text,
        logprob=message.logprob,
        activations=activations or NONE,
        features=features or NONE,
        probes=probes or NONE,
        top_logprobs=top,
        logit_lens=logit_lens or NONE,
    )
