"""Stored graphs and circuits, and the progress of the operations that make them: to protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from glasshouse.server.operations.attribution import circuit_search, graph_tracing
from glasshouse.server.operations.attribution.budget import Estimate
from glasshouse.server.operations.attribution.results import StoredResult
from glasshouse.server.operations.manager import Progress
from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb


def estimate_message(estimate: Estimate, settings: AttributionSettings) -> pb.AttributionEstimate:
    """An estimate beside what is allowed."""
    return pb.AttributionEstimate(
        memory_bytes=estimate.memory_bytes,
        seconds=estimate.seconds,
        passes=estimate.passes,
        active_features=estimate.active_features,
        size=estimate.size,
        memory_budget_bytes=settings.max_memory_bytes,
        seconds_budget=settings.max_seconds,
        seconds_upper_bound=estimate.seconds_upper_bound or estimate.seconds,
        passes_upper_bound=estimate.passes_upper_bound or estimate.passes,
    )


def attribution_metadata(progress: Progress) -> Message:
    """The metadata of an operation whose `facts` are its estimate's message."""
    return pb.AttributionMetadata(
        phase=progress.phase,
        fraction=progress.fraction,
        done=progress.done,
        total=progress.total,
        estimate=progress.facts,
    )


def stored_message(result: StoredResult) -> Message:
    """A stored graph or circuit; of a circuit all but its edges, which `with_edges` adds."""
    if result.name.startswith("circuits/"):
        return circuit_message(result)
    return graph_message(result)


def graph_message(result: StoredResult) -> stored_pb.AttributionGraph:
    """A stored graph."""
    facts = result.facts
    return stored_pb.AttributionGraph(
        name=result.name,
        model=facts["model"],
        title=facts["title"],
        token_ids=facts["token_ids"],
        tokens=facts["tokens"],
        transcoders=facts["transcoders"],
        n_layers=facts["n_layers"],
        n_features=facts["n_features"],
        n_active_features=facts["n_active"],
        n_edges=facts["n_edges"],
        logits=[
            stored_pb.GraphLogit(label=logit["label"], weight=logit["weight"], token_id=logit["token_id"])
            for logit in facts["logits"]
        ],
        scores=stored_pb.GraphScores(replacement=facts["replacement"], completeness=facts["completeness"]),
        pinned=facts["pinned"],
        supernodes=[
            stored_pb.Supernode(label=group["label"], node_ids=group["node_ids"])
            for group in facts["supernodes"]
        ],
        size_bytes=result.size_bytes,
        create_time=_time(result.created_s),
        expire_time=_time(result.expires_s),
        seconds=facts["seconds"],
        held_fixed=graph_tracing.HELD_FIXED,
    )


_CIRCUIT_NUMBERS = (
    "n_edges_total", "threshold", "value", "clean_value", "corrupt_value", "complement_value", "faithfulness",
    "completeness", "n_passes", "seconds",
)  # fmt: skip
_CIRCUIT_LISTS = (
    "clean_token_ids", "clean_tokens", "corrupt_token_ids", "corrupt_tokens", "sources", "destinations",
    "edge_sources", "edge_destinations",
)  # fmt: skip


def circuit_message(result: StoredResult, *, edges: bool = True) -> stored_pb.Circuit:
    """A stored circuit."""
    facts: Mapping[str, Any] = result.facts
    left_out = () if edges else ("sources", "destinations", "edge_sources", "edge_destinations")
    lists = {name: facts[name] for name in _CIRCUIT_LISTS if name not in left_out}
    return stored_pb.Circuit(
        name=result.name,
        model=facts["model"],
        create_time=_time(result.created_s),
        expire_time=_time(result.expires_s),
        held_fixed=circuit_search.HELD_FIXED,
        **lists,
        **{name: facts[name] for name in _CIRCUIT_NUMBERS},
    )


def _time(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
