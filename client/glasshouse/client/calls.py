"""One description of each call, for both transports: its method, its request, and what makes its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from google.longrunning import operations_pb2
from google.protobuf import duration_pb2, empty_pb2
from google.protobuf.message import Message

from glasshouse.client import builders, parsers
from glasshouse.client.extraction import ExtractionState
from glasshouse.client.generation import GenerationState
from glasshouse.client.inputs import Input, as_input, as_message
from glasshouse.client.interventions import Intervention
from glasshouse.client.results import HookPointInfo, ModelInfo, RenderedChat, Score, Tokens
from glasshouse.v1 import activations_pb2, generation_pb2, models_pb2

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """A method of a service: its path, and the class of its response."""

    path: str
    response: type[Message]


@dataclass(frozen=True)
class UnaryCall(Generic[T]):
    """A request with one response."""

    method: Method
    request: Message
    parse: Callable[[Any], T]


@dataclass(frozen=True)
class UploadCall(Generic[T]):
    """A request in several messages, with one response."""

    method: Method
    requests: Sequence[Message]
    parse: Callable[[Any], T]


@dataclass(frozen=True)
class StreamCall:
    """A request with a stream of responses."""

    method: Method
    request: Message


@dataclass(frozen=True)
class GenerationCall(StreamCall):
    """A generation and the state that takes its events."""

    state: GenerationState


@dataclass(frozen=True)
class ExtractionCall(StreamCall):
    """An extraction and the state that takes its events."""

    state: ExtractionState


_MODELS: Final = "/glasshouse.v1.ModelService/"
LIST_MODELS: Final = Method(_MODELS + "ListModels", models_pb2.ListModelsResponse)
GET_MODEL: Final = Method(_MODELS + "GetModel", models_pb2.GetModelResponse)
LIST_HOOK_POINTS: Final = Method(_MODELS + "ListHookPoints", models_pb2.ListHookPointsResponse)
TOKENIZE: Final = Method(_MODELS + "Tokenize", models_pb2.TokenizeResponse)
DETOKENIZE: Final = Method(_MODELS + "Detokenize", models_pb2.DetokenizeResponse)
RENDER_CHAT: Final = Method(_MODELS + "RenderChat", models_pb2.RenderChatResponse)
GENERATE: Final = Method("/glasshouse.v1.GenerationService/Generate", generation_pb2.GenerateResponse)
SCORE: Final = Method("/glasshouse.v1.GenerationService/Score", generation_pb2.ScoreResponse)
EXTRACT_ACTIVATIONS: Final = Method(
    "/glasshouse.v1.ActivationService/ExtractActivations", activations_pb2.ExtractActivationsResponse
)

_OPERATIONS: Final = "/google.longrunning.Operations/"
GET_OPERATION: Final = Method(_OPERATIONS + "GetOperation", operations_pb2.Operation)
WAIT_OPERATION: Final = Method(_OPERATIONS + "WaitOperation", operations_pb2.Operation)
CANCEL_OPERATION: Final = Method(_OPERATIONS + "CancelOperation", empty_pb2.Empty)


def list_models(page_token: str) -> UnaryCall[parsers.Page[ModelInfo]]:
    """A page of the models served."""
    request = models_pb2.ListModelsRequest(page_token=page_token)
    return UnaryCall(LIST_MODELS, request, parsers.model_page)


def get_model(name: str | None) -> UnaryCall[ModelInfo]:
    """One model; None for the only one served."""
    return UnaryCall(GET_MODEL, builders.get_model(name), parsers.model)


def list_hook_points(model: str, page_token: str) -> UnaryCall[parsers.Page[HookPointInfo]]:
    """A page of a model's hook points."""
    request = models_pb2.ListHookPointsRequest(model=model, page_token=page_token)
    return UnaryCall(LIST_HOOK_POINTS, request, parsers.hook_point_page)


def tokenize(model: str, value: Any, add_special_tokens: bool) -> UnaryCall[Tokens]:
    """An input to tokens."""
    return UnaryCall(TOKENIZE, builders.tokenize(model, as_input(value), add_special_tokens), parsers.tokens)


def detokenize(model: str, ids: Iterable[int]) -> UnaryCall[str]:
    """Token ids to text."""
    return UnaryCall(DETOKENIZE, builders.detokenize(model, ids), parsers.text)


def render_chat(model: str, messages: Iterable[Any], add_generation_prompt: bool) -> UnaryCall[RenderedChat]:
    """A conversation to text."""
    turns = [as_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
    return UnaryCall(
        RENDER_CHAT, builders.render_chat(model, turns, add_generation_prompt), parsers.rendered_chat
    )


def score(model: str, value: Any, interventions: Sequence[Intervention], top_k: int) -> UnaryCall[Score]:
    """Log-probabilities of a sequence."""
    request = builders.score(model, as_input(value), interventions=interventions, top_k=top_k)
    return UnaryCall(SCORE, request, parsers.score)


def generate(model: str, prompt: Any, **parameters: Any) -> GenerationCall:
    """A generation; `parameters` are those of `builders.generate`."""
    request = builders.generate(model, as_input(prompt), **parameters)
    return GenerationCall(GENERATE, request, GenerationState(parameters.get("readouts", ())))


def extract(model: str, inputs: Sequence[Input], **parameters: Any) -> ExtractionCall:
    """An extraction; `parameters` are those of `builders.extract_activations`."""
    request = builders.extract_activations(model, inputs, **parameters)
    return ExtractionCall(EXTRACT_ACTIVATIONS, request, ExtractionState(request.hook_points, len(inputs)))


def get_operation(name: str) -> UnaryCall[operations_pb2.Operation]:
    """An operation as it stands."""
    return UnaryCall(GET_OPERATION, operations_pb2.GetOperationRequest(name=name), _itself)


def wait_operation(name: str, wait_s: float) -> UnaryCall[operations_pb2.Operation]:
    """An operation once it is done, or after `wait_s` seconds as it stands then."""
    wait = duration_pb2.Duration()
    wait.FromNanoseconds(round(wait_s * 1e9))
    return UnaryCall(WAIT_OPERATION, operations_pb2.WaitOperationRequest(name=name, timeout=wait), _itself)


def cancel_operation(name: str) -> UnaryCall[object]:
    """An operation to an early end."""
    return UnaryCall(CANCEL_OPERATION, operations_pb2.CancelOperationRequest(name=name), _itself)


def _itself(message: Any) -> Any:
    return message
