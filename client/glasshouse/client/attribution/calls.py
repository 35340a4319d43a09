"""AttributionService's calls, for both transports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np
from google.longrunning import operations_pb2
from numpy.typing import NDArray

from glasshouse.client.attribution import builders, parsers
from glasshouse.client.attribution.graph import AttributionGraph, GraphInfo
from glasshouse.client.attribution.parsers import GraphState
from glasshouse.client.attribution.parts import ResultState
from glasshouse.client.attribution.sweeps import SweepState
from glasshouse.client.attribution.values import (
    AttributionEstimate,
    AttributionPatchResult,
    Circuit,
    DirectAttribution,
    FeatureAttribution,
    FeatureConnections,
    FeatureIntervention,
    TokenAttribution,
)
from glasshouse.client.calls import Method, StreamCall, UnaryCall
from glasshouse.client.operations import OperationKind, OperationState
from glasshouse.client.parsers import Page
from glasshouse.client.scalars import text
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb

T = TypeVar("T")

_SERVICE: Final = "/glasshouse.v1.AttributionService/"
ATTRIBUTE_TOKENS: Final = Method(_SERVICE + "AttributeTokens", pb.AttributeTokensResponse)
DIRECT_ATTRIBUTION: Final = Method(_SERVICE + "DirectAttribution", pb.DirectAttributionResponse)
PATCH_SWEEP: Final = Method(_SERVICE + "PatchSweep", pb.PatchSweepResponse)
MEDIATE_EFFECT: Final = Method(_SERVICE + "MediateEffect", pb.MediateEffectResponse)
PATH_PATCH: Final = Method(_SERVICE + "PathPatch", pb.PathPatchResponse)
ATTRIBUTION_PATCH: Final = Method(_SERVICE + "AttributionPatch", pb.AttributionPatchResponse)
ATTRIBUTE_FEATURES: Final = Method(_SERVICE + "AttributeFeatures", pb.AttributeFeaturesResponse)
DISCOVER_CIRCUIT: Final = Method(_SERVICE + "DiscoverCircuit", operations_pb2.Operation)
CREATE_GRAPH: Final = Method(_SERVICE + "CreateAttributionGraph", operations_pb2.Operation)
ESTIMATE: Final = Method(_SERVICE + "EstimateAttribution", pb.EstimateAttributionResponse)
INTERVENE: Final = Method(_SERVICE + "InterveneOnFeatures", pb.InterveneOnFeaturesResponse)
CONNECTIONS: Final = Method(_SERVICE + "FeatureConnections", pb.FeatureConnectionsResponse)
LIST_GRAPHS: Final = Method(_SERVICE + "ListAttributionGraphs", stored_pb.ListAttributionGraphsResponse)
UPDATE_GRAPH: Final = Method(_SERVICE + "UpdateAttributionGraph", stored_pb.UpdateAttributionGraphResponse)
DELETE_GRAPH: Final = Method(_SERVICE + "DeleteAttributionGraph", stored_pb.DeleteAttributionGraphResponse)
READ_GRAPH: Final = Method(_SERVICE + "ReadAttributionGraph", stored_pb.ReadAttributionGraphResponse)
GET_CIRCUIT: Final = Method(_SERVICE + "GetCircuit", stored_pb.GetCircuitResponse)
LIST_CIRCUITS: Final = Method(_SERVICE + "ListCircuits", stored_pb.ListCircuitsResponse)
DELETE_CIRCUIT: Final = Method(_SERVICE + "DeleteCircuit", stored_pb.DeleteCircuitResponse)

GRAPH: Final = OperationKind(pb.AttributionMetadata, stored_pb.AttributionGraph, parsers.graph_info)
CIRCUIT: Final = OperationKind(pb.AttributionMetadata, stored_pb.Circuit, parsers.circuit)


@dataclass(frozen=True)
class ResultCall(StreamCall, Generic[T]):
    """A call whose stream is one result, and the state that takes its events."""

    state: ResultState[T]


@dataclass(frozen=True)
class SweepCall(StreamCall):
    """A sweep, or a mediation analysis, and the state that takes its events."""

    state: SweepState


@dataclass(frozen=True)
class GraphCall(StreamCall):
    """A stored graph's contents, and the state that takes them."""

    state: GraphState


def attribute_tokens(*arguments: Any, **parameters: Any) -> ResultCall[TokenAttribution]:
    """`builders.attribute_tokens`' arguments."""
    request = builders.attribute_tokens(*arguments, **parameters)
    return ResultCall(ATTRIBUTE_TOKENS, request, ResultState("attribution", parsers.token_attribution))


def direct_attribution(*arguments: Any, **parameters: Any) -> ResultCall[DirectAttribution]:
    """`builders.direct_attribution`'s arguments."""
    request = builders.direct_attribution(*arguments, **parameters)
    return ResultCall(DIRECT_ATTRIBUTION, request, ResultState("attribution", parsers.direct_attribution))


def patch_sweep(*arguments: Any, **parameters: Any) -> SweepCall:
    """`builders.patch_sweep`'s arguments."""
    return SweepCall(PATCH_SWEEP, builders.patch_sweep(*arguments, **parameters), SweepState())


def mediate_effect(*arguments: Any, **parameters: Any) -> SweepCall:
    """`builders.mediate_effect`'s arguments."""
    return SweepCall(MEDIATE_EFFECT, builders.mediate_effect(*arguments, **parameters), SweepState())


def path_patch(*arguments: Any, **parameters: Any) -> UnaryCall[NDArray[np.float64]]:
    """`builders.path_patch`'s arguments."""
    return UnaryCall(PATH_PATCH, builders.path_patch(*arguments, **parameters), parsers.path_patch)


def attribution_patch(*arguments: Any, **parameters: Any) -> ResultCall[AttributionPatchResult]:
    """`builders.attribution_patch`'s arguments."""
    request = builders.attribution_patch(*arguments, **parameters)
    return ResultCall(ATTRIBUTION_PATCH, request, ResultState("result", parsers.attribution_patch))


def attribute_features(*arguments: Any, **parameters: Any) -> ResultCall[FeatureAttribution]:
    """`builders.attribute_features`' arguments."""
    request = builders.attribute_features(*arguments, **parameters)
    return ResultCall(ATTRIBUTE_FEATURES, request, ResultState("result", parsers.feature_attribution))


def intervene_on_features(*arguments: Any, **parameters: Any) -> ResultCall[FeatureIntervention]:
    """`builders.intervene_on_features`' arguments."""
    request = builders.intervene_on_features(*arguments, **parameters)
    return ResultCall(INTERVENE, request, ResultState("result", parsers.feature_intervention))


def feature_connections(*arguments: Any, **parameters: Any) -> UnaryCall[FeatureConnections]:
    """`builders.feature_connections`' arguments."""
    request = builders.feature_connections(*arguments, **parameters)
    return UnaryCall(CONNECTIONS, request, parsers.feature_connections)


def discover_circuit(request: pb.DiscoverCircuitRequest) -> UnaryCall[OperationState[Circuit]]:
    """A search, as an operation."""
    return UnaryCall(DISCOVER_CIRCUIT, request, lambda operation: OperationState(CIRCUIT, operation))


def create_graph(request: pb.CreateAttributionGraphRequest) -> UnaryCall[OperationState[GraphInfo]]:
    """A trace, as an operation."""
    return UnaryCall(CREATE_GRAPH, request, lambda operation: OperationState(GRAPH, operation))


def estimate(**operation: Any) -> UnaryCall[AttributionEstimate]:
    """What an operation would take: its request as `graph` or `circuit`."""
    return UnaryCall(ESTIMATE, pb.EstimateAttributionRequest(**operation), parsers.estimate)


def read_graph(
    name: str, node_threshold: float | None = None, edge_threshold: float | None = None
) -> GraphCall:
    """A stored graph; pruned by the server where a threshold is given."""
    request = stored_pb.ReadAttributionGraphRequest(
        name=text(name, "name"), node_threshold=node_threshold, edge_threshold=edge_threshold
    )
    return GraphCall(READ_GRAPH, request, GraphState(request))


def list_graphs(page_token: str) -> UnaryCall[Page[GraphInfo]]:
    """A page of the stored graphs."""
    request = stored_pb.ListAttributionGraphsRequest(page_token=page_token)
    return UnaryCall(LIST_GRAPHS, request, parsers.graph_page)


def update_graph(graph: AttributionGraph) -> UnaryCall[GraphInfo]:
    """A graph's marks, kept by the server."""
    return UnaryCall(UPDATE_GRAPH, builders.marks(graph), parsers.updated_graph)


def delete_graph(name: str) -> UnaryCall[None]:
    """A stored graph, gone."""
    request = stored_pb.DeleteAttributionGraphRequest(name=text(name, "name"))
    return UnaryCall(DELETE_GRAPH, request, lambda _: None)


def get_circuit(name: str) -> UnaryCall[Circuit]:
    """A stored circuit."""
    return UnaryCall(GET_CIRCUIT, stored_pb.GetCircuitRequest(name=text(name, "name")), parsers.got_circuit)


def list_circuits(page_token: str) -> UnaryCall[Page[Circuit]]:
    """A page of the stored circuits, without their edges."""
    request = stored_pb.ListCircuitsRequest(page_token=page_token)
    return UnaryCall(LIST_CIRCUITS, request, parsers.circuit_page)


def delete_circuit(name: str) -> UnaryCall[None]:
    """A stored circuit, gone."""
    return UnaryCall(DELETE_CIRCUIT, stored_pb.DeleteCircuitRequest(name=text(name, "name")), lambda _: None)
