"""The calls of DirectionService, ProbeService and FeatureLabelService, for both transports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from google.longrunning import operations_pb2

from glasshouse.client.calls import Method, StreamCall, UnaryCall, UploadCall
from glasshouse.client.concepts import builders, parsers
from glasshouse.client.concepts.scoring import ScoringState
from glasshouse.client.concepts.values import (
    DirectionInfo,
    FeatureLabel,
    FeatureLabelsInfo,
    ProbeInfo,
    ProbeScores,
)
from glasshouse.client.inputs import as_inputs
from glasshouse.client.operations import OperationKind, OperationState
from glasshouse.client.parsers import Page
from glasshouse.client.scalars import text
from glasshouse.v1 import directions_pb2, feature_labels_pb2, probes_pb2

T = TypeVar("T")

_DIRECTIONS: Final = "/glasshouse.v1.DirectionService/"
COMPUTE_DIRECTIONS: Final = Method(_DIRECTIONS + "ComputeDirections", operations_pb2.Operation)
CREATE_DIRECTION: Final = Method(_DIRECTIONS + "CreateDirection", directions_pb2.CreateDirectionResponse)
GET_DIRECTION: Final = Method(_DIRECTIONS + "GetDirection", directions_pb2.GetDirectionResponse)
LIST_DIRECTIONS: Final = Method(_DIRECTIONS + "ListDirections", directions_pb2.ListDirectionsResponse)
DELETE_DIRECTION: Final = Method(_DIRECTIONS + "DeleteDirection", directions_pb2.DeleteDirectionResponse)

_PROBES: Final = "/glasshouse.v1.ProbeService/"
TRAIN_PROBE: Final = Method(_PROBES + "TrainProbe", operations_pb2.Operation)
CREATE_PROBE: Final = Method(_PROBES + "CreateProbe", probes_pb2.CreateProbeResponse)
GET_PROBE: Final = Method(_PROBES + "GetProbe", probes_pb2.GetProbeResponse)
LIST_PROBES: Final = Method(_PROBES + "ListProbes", probes_pb2.ListProbesResponse)
DELETE_PROBE: Final = Method(_PROBES + "DeleteProbe", probes_pb2.DeleteProbeResponse)
SCORE_PROBE: Final = Method(_PROBES + "ScoreProbe", probes_pb2.ScoreProbeResponse)

_LABELS: Final = "/glasshouse.v1.FeatureLabelService/"
_labels_pb = feature_labels_pb2
CREATE_LABELS: Final = Method(_LABELS + "CreateFeatureLabels", _labels_pb.CreateFeatureLabelsResponse)
GET_LABELS: Final = Method(_LABELS + "GetFeatureLabels", _labels_pb.GetFeatureLabelsResponse)
LIST_LABELS: Final = Method(_LABELS + "ListFeatureLabels", _labels_pb.ListFeatureLabelsResponse)


@dataclass(frozen=True)
class ScoringCall(StreamCall):
    """A scoring, the state that takes its events, and whether a list was asked for."""

    state: ScoringState
    many: bool

    def result(self) -> ProbeScores | list[ProbeScores]:
        """The one input's scores, or a list; once the stream is over."""
        found = self.state.result()
        return found if self.many else found[0]


def compute_directions(
    model: str, examples: Any, handle: Callable[[DirectionInfo], T], **parameters: Any
) -> UploadCall[OperationState[T]]:
    """A computation, as an operation whose result is a handle."""
    kind = OperationKind(
        directions_pb2.ComputeDirectionsMetadata,
        directions_pb2.ComputeDirectionsResponse,
        lambda response: handle(parsers.computed(response)),
    )
    requests = builders.compute_directions(model, examples, **parameters)
    return UploadCall(COMPUTE_DIRECTIONS, requests, lambda operation: OperationState(kind, operation))


def create_direction(model: str, **parameters: Any) -> UnaryCall[str]:
    """Vectors under a name; the resource name."""
    request = builders.create_direction(model, **parameters)
    return UnaryCall(CREATE_DIRECTION, request, lambda response: str(response.direction.name))


def get_direction(model: str, name: str) -> UnaryCall[DirectionInfo]:
    """One direction."""
    request = directions_pb2.GetDirectionRequest(name=_full(model, "directions", name))
    return UnaryCall(GET_DIRECTION, request, parsers.got_direction)


def list_directions(
    model: str, prefix: str, every_version: bool, page_token: str
) -> UnaryCall[Page[DirectionInfo]]:
    """A page of directions."""
    request = directions_pb2.ListDirectionsRequest(
        model=model, name_prefix=prefix, every_version=every_version, page_token=page_token
    )
    return UnaryCall(LIST_DIRECTIONS, request, parsers.direction_page)


def delete_direction(name: str) -> UnaryCall[list[str]]:
    """A direction out of the registry."""
    request = directions_pb2.DeleteDirectionRequest(name=name)
    return UnaryCall(DELETE_DIRECTION, request, lambda response: list(response.deleted))


def train_probe(
    model: str, examples: Any, handle: Callable[[ProbeInfo], T], **parameters: Any
) -> UploadCall[OperationState[T]]:
    """A training, as an operation whose result is a handle."""
    kind = OperationKind(
        probes_pb2.TrainProbeMetadata,
        probes_pb2.TrainProbeResponse,
        lambda response: handle(parsers.trained(response)),
    )
    requests = builders.train_probe(model, examples, **parameters)
    return UploadCall(TRAIN_PROBE, requests, lambda operation: OperationState(kind, operation))


def create_probe(model: str, **parameters: Any) -> UnaryCall[ProbeInfo]:
    """A probe trained elsewhere, under a name."""
    request = builders.create_probe(model, **parameters)
    return UnaryCall(CREATE_PROBE, request, lambda response: parsers.probe(response.probe))


def get_probe(model: str, name: str, with_weights: bool) -> UnaryCall[ProbeInfo]:
    """One probe."""
    request = probes_pb2.GetProbeRequest(name=_full(model, "probes", name), with_weights=with_weights)
    return UnaryCall(GET_PROBE, request, parsers.got_probe)


def list_probes(model: str, prefix: str, every_version: bool, page_token: str) -> UnaryCall[Page[ProbeInfo]]:
    """A page of probes."""
    request = probes_pb2.ListProbesRequest(
        model=model, name_prefix=prefix, every_version=every_version, page_token=page_token
    )
    return UnaryCall(LIST_PROBES, request, parsers.probe_page)


def delete_probe(name: str) -> UnaryCall[list[str]]:
    """A probe out of the registry."""
    request = probes_pb2.DeleteProbeRequest(name=name)
    return UnaryCall(DELETE_PROBE, request, lambda response: list(response.deleted))


def score_probe(probe: str, value: Any, **parameters: Any) -> ScoringCall:
    """Scores of an input or of a list of them; `parameters` are those of `builders.score_probe`."""
    inputs, many = as_inputs(value)
    request = builders.score_probe(probe, inputs, **parameters)
    return ScoringCall(SCORE_PROBE, request, ScoringState(len(inputs)), many)


def create_feature_labels(dictionary: str, labels: Any, **parameters: Any) -> UnaryCall[FeatureLabelsInfo]:
    """A set of labels under a name."""
    request = builders.create_feature_labels(dictionary, labels, **parameters)
    return UnaryCall(CREATE_LABELS, request, lambda response: parsers.feature_labels(response.feature_labels))


def list_feature_labels(dictionary: str, page_token: str) -> UnaryCall[Page[FeatureLabelsInfo]]:
    """A page of the sets of labels of a dictionary."""
    model = dictionary.partition("/dictionaries/")[0]
    request = feature_labels_pb2.ListFeatureLabelsRequest(
        model=model, dictionary=dictionary, page_token=page_token
    )
    return UnaryCall(LIST_LABELS, request, parsers.feature_labels_page)


def get_feature_labels(
    model: str, name: str, features: Sequence[int], page_token: str
) -> UnaryCall[Page[FeatureLabel]]:
    """A page of a set's labels."""
    request = feature_labels_pb2.GetFeatureLabelsRequest(
        name=_full(model, "featureLabels", name), features=features, page_token=page_token
    )
    return UnaryCall(GET_LABELS, request, parsers.label_page)


def _full(model: str, collection: str, name: str) -> str:
    name = text(name, "name")
    return name if name.startswith("models/") else f"{model}/{collection}/{name}"
