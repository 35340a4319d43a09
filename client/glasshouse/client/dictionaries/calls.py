"""DictionaryService's calls, for both transports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.longrunning import operations_pb2
from numpy.typing import NDArray

from glasshouse.client.calls import Method, StreamCall, UnaryCall
from glasshouse.client.dictionaries import builders, parsers
from glasshouse.client.dictionaries.encoding import EncodingState
from glasshouse.client.dictionaries.names import as_features
from glasshouse.client.dictionaries.values import (
    DictionaryEvaluation,
    DictionaryInfo,
    FeatureInfo,
    FeatureSummary,
)
from glasshouse.client.features import FeatureRows, FeaturesLike
from glasshouse.client.inputs import as_inputs
from glasshouse.client.operations import OperationKind, OperationState
from glasshouse.client.parsers import Page
from glasshouse.v1 import dictionaries_pb2

_SERVICE: Final = "/glasshouse.v1.DictionaryService/"
LIST_DICTIONARIES: Final = Method(_SERVICE + "ListDictionaries", dictionaries_pb2.ListDictionariesResponse)
GET_DICTIONARY: Final = Method(_SERVICE + "GetDictionary", dictionaries_pb2.GetDictionaryResponse)
LOAD_DICTIONARY: Final = Method(_SERVICE + "LoadDictionary", dictionaries_pb2.LoadDictionaryResponse)
UNLOAD_DICTIONARY: Final = Method(_SERVICE + "UnloadDictionary", dictionaries_pb2.UnloadDictionaryResponse)
ENCODE_FEATURES: Final = Method(_SERVICE + "EncodeFeatures", dictionaries_pb2.EncodeFeaturesResponse)
DECODE_FEATURES: Final = Method(_SERVICE + "DecodeFeatures", dictionaries_pb2.DecodeFeaturesResponse)
GET_FEATURE: Final = Method(_SERVICE + "GetFeature", dictionaries_pb2.GetFeatureResponse)
LIST_FEATURES: Final = Method(_SERVICE + "ListFeatures", dictionaries_pb2.ListFeaturesResponse)
EVALUATE_DICTIONARY: Final = Method(_SERVICE + "EvaluateDictionary", operations_pb2.Operation)

EVALUATION: Final = OperationKind(
    dictionaries_pb2.EvaluateDictionaryMetadata,
    dictionaries_pb2.EvaluateDictionaryResponse,
    parsers.evaluation,
)


@dataclass(frozen=True)
class EncodingCall(StreamCall):
    """An encoding, the state that takes its events, and whether a list was asked for."""

    state: EncodingState
    many: bool

    def result(self) -> Any:
        """The one input's features, or a list; once the stream is over."""
        found = self.state.result()
        return found if self.many else found[0]


@dataclass(frozen=True)
class DecodingCalls:
    """The calls that together decode some features."""

    calls: list[UnaryCall[NDArray[np.float32]]]
    info: DictionaryInfo
    one: bool

    def result(self, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """What the calls gave, as one array: (n, d_out) or (n, n_hook_points_out, d_out), without the first axis
        where one position was decoded."""
        if not parts:
            n_out = len(self.info.hook_points_out)
            return np.zeros((0, n_out, self.info.d_out) if n_out > 1 else (0, self.info.d_out), np.float32)
        whole = np.concatenate(parts)
        return whole[0] if self.one else whole


def list_dictionaries(model: str, page_token: str) -> UnaryCall[Page[DictionaryInfo]]:
    """A page of a model's dictionaries."""
    request = dictionaries_pb2.ListDictionariesRequest(model=model, page_token=page_token)
    return UnaryCall(LIST_DICTIONARIES, request, parsers.dictionary_page)


def get_dictionary(model: str, name: str) -> UnaryCall[DictionaryInfo]:
    """One dictionary."""
    return UnaryCall(GET_DICTIONARY, builders.get_dictionary(model, name), parsers.got_dictionary)


def load_dictionary(model: str, name: str, path: str) -> UnaryCall[list[DictionaryInfo]]:
    """A dictionary, or a set of them, into the server."""
    return UnaryCall(LOAD_DICTIONARY, builders.load_dictionary(model, name, path), parsers.loaded)


def unload_dictionary(name: str) -> UnaryCall[None]:
    """A dictionary out of the server."""
    request = dictionaries_pb2.UnloadDictionaryRequest(name=name)
    return UnaryCall(UNLOAD_DICTIONARY, request, lambda _: None)


def encode(info: DictionaryInfo, value: Any, features: Any, **parameters: Any) -> EncodingCall:
    """Features of an input, of a list of them, or (with None) of given activations; `parameters` are those of
    `builders.encode`."""
    inputs, many = as_inputs(value) if value is not None else ([], False)
    request = builders.encode(info.resource_name, inputs, features=as_features(features), **parameters)
    # Given activations come back as one input.
    n_inputs = len(inputs) if value is not None else 1
    return EncodingCall(ENCODE_FEATURES, request, EncodingState(info.name, n_inputs), many)


def decode(info: DictionaryInfo, features: FeaturesLike, bias: bool) -> DecodingCalls:
    """What features write."""
    requests = builders.decode(info, features, bias)
    calls = [UnaryCall(DECODE_FEATURES, request, parsers.decoded) for request in requests]
    return DecodingCalls(calls, info, not isinstance(features, FeatureRows))


def get_feature(dictionary: str, feature: int, n_tokens: int, n_nearest: int) -> UnaryCall[FeatureInfo]:
    """One feature."""
    request = builders.get_feature(dictionary, feature, n_tokens, n_nearest)
    return UnaryCall(GET_FEATURE, request, parsers.feature)


def list_features(
    dictionary: str, order: str, page_size: int, page_token: str
) -> UnaryCall[Page[FeatureSummary]]:
    """A page of a dictionary's features."""
    request = builders.list_features(dictionary, order, page_size, page_token)
    return UnaryCall(LIST_FEATURES, request, parsers.feature_page)


def evaluate(
    dictionary: str, inputs: Sequence[Any] | None, max_tokens: int
) -> UnaryCall[OperationState[DictionaryEvaluation]]:
    """A measurement, as an operation."""
    chosen = as_inputs(inputs)[0] if inputs is not None else []
    request = builders.evaluate(dictionary, chosen, max_tokens)
    return UnaryCall(EVALUATE_DICTIONARY, request, lambda operation: OperationState(EVALUATION, operation))
