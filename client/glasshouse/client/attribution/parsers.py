"""AttributionService's response messages -> results."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import Array
from glasshouse.client.attribution.graph import (
    AttributionGraph,
    GraphInfo,
    GraphLogit,
    Supernode,
    edges_of,
    features_of,
)
from glasshouse.client.attribution.parts import NamedTensors, held_fixed, tokens
from glasshouse.client.attribution.patches import PatchNode
from glasshouse.client.attribution.pruning import GraphScores
from glasshouse.client.attribution.values import (
    AttributionEstimate,
    AttributionPatchResult,
    Circuit,
    DictionaryAttribution,
    DirectAttribution,
    FeatureAttribution,
    FeatureConnection,
    FeatureConnections,
    FeatureContributions,
    FeatureIntervention,
    LogitChange,
    TokenAttribution,
    Verification,
)
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.parsers import Page
from glasshouse.client.results import Tokens
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb

_FACTS_OF_CIRCUITS = (
    "name", "n_edges_total", "threshold", "value", "clean_value", "corrupt_value", "complement_value", "faithfulness",
    "completeness", "n_passes", "seconds", "held_fixed",
)  # fmt: skip
_FACTS_OF_ESTIMATES = (
    "memory_bytes", "seconds", "passes", "active_features", "size", "memory_budget_bytes", "seconds_budget",
    "seconds_upper_bound", "passes_upper_bound",
)  # fmt: skip
_FACTS_OF_LOGITS = (
    "token_id", "token", "logit_before", "logit_after", "probability_before", "probability_after", "measured",
    "predicted",
)  # fmt: skip


def token_attribution(message: pb.TokenAttribution, arrays: dict[str, Array]) -> TokenAttribution:
    """Of AttributeTokens."""
    return TokenAttribution(
        input=tokens(message.input),
        scores=np.array(message.scores, dtype=np.float64),
        value=message.value,
        baseline_value=message.baseline_value,
        residual=message.residual,
        hook_point=message.hook_point,
        held_fixed=held_fixed(message.held_fixed),
        attributions=arrays.get("attributions"),
    )


def direct_attribution(message: pb.DirectAttributionResult, arrays: dict[str, Array]) -> DirectAttribution:
    """Of DirectAttribution."""
    return DirectAttribution(
        input=tokens(message.input),
        position=message.position,
        targets=tokens(message.targets),
        foils=tokens(message.foils),
        logit=message.logit,
        constant=message.constant,
        remainder=message.remainder,
        contributions={part.hook_point: part.part for part in message.contributions},
        features=[
            FeatureContributions(
                dictionary=item.dictionary,
                hook_point=item.hook_point,
                features=np.array(item.features, dtype=np.int32),
                parts=np.array(item.parts, dtype=np.float64),
                rest=item.rest,
                bias=item.bias,
                error=item.error,
                total=item.total,
            )
            for item in message.features
        ],
        held_fixed=held_fixed(message.held_fixed),
        **arrays,
    )


def attribution_patch(message: pb.AttributionPatchResult, arrays: dict[str, Array]) -> AttributionPatchResult:
    """Of AttributionPatch."""
    edges = arrays.pop("scores", None) if message.sources else None
    if edges is not None:
        edges = np.where(arrays.pop("valid"), edges, np.float32("nan"))
    return AttributionPatchResult(
        method=message.method,
        clean=tokens(message.clean),
        corrupt=tokens(message.corrupt),
        clean_value=message.clean_value,
        corrupt_value=message.corrupt_value,
        magnitudes=message.magnitudes,
        scores=arrays,
        sources=list(message.sources),
        destinations=list(message.destinations),
        edge_scores=edges,
        verification=_verification(message) if message.HasField("verification") else None,
        held_fixed=held_fixed(message.held_fixed),
    )


def _verification(message: pb.AttributionPatchResult) -> Verification:
    found = message.verification
    return Verification(
        nodes=[patch_node(node) for node in found.nodes],
        edges=[
            (message.sources[source], message.destinations[end])
            for source, end in zip(found.sources, found.destinations)
        ],
        approximate=np.array(found.approximate, dtype=np.float64),
        exact=np.array(found.exact, dtype=np.float64),
        rank_correlation=found.rank_correlation,
    )


def patch_node(message: pb.PatchNode) -> PatchNode:
    """A single node."""

    def given(name: Any) -> int | None:
        return getattr(message, name) if message.HasField(name) else None

    return PatchNode(message.hook_point, given("position"), given("head"), given("unit"))


def feature_attribution(message: pb.FeatureAttributionResult, arrays: dict[str, Array]) -> FeatureAttribution:
    """Of AttributeFeatures."""
    found = []
    for index, item in enumerate(message.dictionaries):
        indptr = arrays[f"{index}.indptr"]
        found.append(
            DictionaryAttribution(
                dictionary=item.dictionary,
                hook_point=item.hook_point,
                positions=np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)),
                features=arrays[f"{index}.features"],
                attributions=arrays[f"{index}.attributions"],
                errors=arrays[f"{index}.errors"],
                value=item.value,
                baseline_value=item.baseline_value,
                residual=item.residual,
            )
        )
    return FeatureAttribution(
        input=tokens(message.input), dictionaries=found, held_fixed=held_fixed(message.held_fixed)
    )


def path_patch(message: pb.PathPatchResponse) -> NDArray[np.float64]:
    """(n_senders,): effects of PathPatch."""
    return np.array(message.values, dtype=np.float64) - message.base_value


def feature_intervention(
    message: pb.FeatureInterventionResult, arrays: dict[str, Array]
) -> FeatureIntervention:
    """Of InterveneOnFeatures."""
    return FeatureIntervention(
        input=tokens(message.input),
        logits=[
            LogitChange(**{name: getattr(item, name) for name in _FACTS_OF_LOGITS}) for item in message.logits
        ],
        text_before=message.text_before,
        text_after=message.text_after,
        feature_correlation=message.feature_correlation,
        logit_correlation=message.logit_correlation,
        held_fixed=held_fixed(message.held_fixed),
        **arrays,
    )


def feature_connections(message: pb.FeatureConnectionsResponse) -> FeatureConnections:
    """Of FeatureConnections."""
    incoming, outgoing = (
        [FeatureConnection(item.layer, item.feature, item.weight) for item in found]
        for found in (message.incoming, message.outgoing)
    )
    return FeatureConnections(incoming, outgoing, held_fixed(message.held_fixed))


def estimate(message: pb.EstimateAttributionResponse) -> AttributionEstimate:
    """Of EstimateAttribution."""
    facts = {name: getattr(message.estimate, name) for name in _FACTS_OF_ESTIMATES}
    return AttributionEstimate(**facts, refusal=message.refusal)


def circuit(message: stored_pb.Circuit) -> Circuit:
    """A stored circuit."""
    sources, destinations = list(message.sources), list(message.destinations)
    return Circuit(
        **{name: getattr(message, name) for name in _FACTS_OF_CIRCUITS},
        clean=Tokens(list(message.clean_token_ids), list(message.clean_tokens)),
        corrupt=Tokens(list(message.corrupt_token_ids), list(message.corrupt_tokens)),
        edges=[
            (sources[source], destinations[end])
            for source, end in zip(message.edge_sources, message.edge_destinations, strict=True)
        ],
        sources=sources,
        destinations=destinations,
    )


def got_circuit(message: stored_pb.GetCircuitResponse) -> Circuit:
    """Of GetCircuit."""
    return circuit(message.circuit)


def circuit_page(message: stored_pb.ListCircuitsResponse) -> Page[Circuit]:
    """A page of ListCircuits: circuits without their edges."""
    return Page([circuit(item) for item in message.circuits], message.next_page_token)


def graph_info(message: stored_pb.AttributionGraph) -> GraphInfo:
    """What is known of a stored graph."""
    return GraphInfo(
        name=message.name,
        model=message.model.removeprefix("models/"),
        title=message.title,
        token_ids=list(message.token_ids),
        tokens=list(message.tokens),
        transcoders=list(message.transcoders),
        n_layers=message.n_layers,
        n_features=message.n_features,
        n_active_features=message.n_active_features,
        n_edges=message.n_edges,
        logits=[
            GraphLogit(item.label, item.weight, item.token_id if item.HasField("token_id") else None)
            for item in message.logits
        ],
        scores=GraphScores(message.scores.replacement, message.scores.completeness),
        pinned=list(message.pinned),
        supernodes=[Supernode(group.label, tuple(group.node_ids)) for group in message.supernodes],
        size_bytes=message.size_bytes,
        created=_time(message.create_time) if message.HasField("create_time") else None,
        expires=_time(message.expire_time) if message.HasField("expire_time") else None,
        seconds=message.seconds,
        held_fixed=message.held_fixed,
    )


def updated_graph(message: stored_pb.UpdateAttributionGraphResponse) -> GraphInfo:
    """Of UpdateAttributionGraph."""
    return graph_info(message.graph)


def graph_page(message: stored_pb.ListAttributionGraphsResponse) -> Page[GraphInfo]:
    """A page of ListAttributionGraphs."""
    return Page([graph_info(item) for item in message.graphs], message.next_page_token)


class GraphState:
    """A stored graph as its pieces come."""

    def __init__(self, request: stored_pb.ReadAttributionGraphRequest) -> None:
        self._request = request
        self._contents: stored_pb.GraphContents | None = None
        self._tensors = NamedTensors()

    def feed(self, event: stored_pb.ReadAttributionGraphResponse) -> None:
        """Takes in one event."""
        if event.HasField("contents"):
            self._contents = event.contents
            self._tensors.announce(event.contents.tensors)
        elif event.HasField("tensor"):
            self._tensors.feed(event.tensor)

    def result(self) -> AttributionGraph:
        """The graph, once the stream is over. Raises GlasshouseError where it broke off."""
        if self._contents is None:
            raise GlasshouseError("the stream ended before the graph", code="DATA_LOSS")
        arrays = self._tensors.arrays()
        thresholds = None
        if "nodes_kept" in arrays:
            asked = self._request
            thresholds = tuple(
                getattr(asked, name) if asked.HasField(name) else 1.0
                for name in ("node_threshold", "edge_threshold")
            )
        return AttributionGraph(
            graph_info(self._contents.graph),
            features_of(arrays),
            edges_of(arrays),
            kept=arrays.get("nodes_kept"),
            cumulative=arrays.get("cumulative_influence"),
            thresholds=thresholds,  # type: ignore[arg-type]
        )


def _time(stamp: Any) -> datetime:
    moment: datetime = stamp.ToDatetime(tzinfo=UTC)
    return moment
