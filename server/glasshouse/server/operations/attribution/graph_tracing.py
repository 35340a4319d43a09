"""An attribution graph as an operation: estimated, traced, stored, read again.

1. The estimate runs the prompt once, counts what fires, and times one batch of rows.
2. Tracing is `attribution.attribution_graph`, told of at every batch of rows.
3. Stored: the selected features, the sparse edges, the logit targets, and of the whole graph its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from glasshouse.server.attribution.attribution_graph import (
    AttributionGraph,
    LogitTarget,
    trace_graph,
)
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.graph_estimate import estimate
from glasshouse.server.attribution.influence import Edges
from glasshouse.server.attribution.local_model import LocalModel, logit_vector
from glasshouse.server.attribution.progress import Progress
from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders
from glasshouse.server.dictionaries.dictionary import Dictionary

from .budget import Estimate

DEFAULT_BATCH = 64
# A stored edge: target, source, weight.
_EDGE_BYTES = 12
HELD_FIXED = (
    "Attention patterns and the scales of all norms are held at the prompt's own; what MLPs write is taken apart into "
    "transcoder features and an error, which do not respond to one another but through the edges."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class AskedTarget:
    """A logit target of the caller's: a token, or a vector (d_model,). `weight` None: the token's probability."""

    label: str
    token_id: int | None
    vector: Tensor | None
    weight: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphRequest:
    """What is traced. `targets` empty: the likeliest next tokens."""

    tokens: tuple[int, ...]
    dictionaries: Sequence[Dictionary]
    targets: Sequence[AskedTarget] = ()
    desired_probability: float = 0.95
    max_logits: int = 10
    max_features: int = 4096
    batch_size: int = DEFAULT_BATCH
    update_interval: int = 4
    skip_first: bool = True


def estimate_graph(model: GradientModel, asked: GraphRequest) -> Estimate:
    """Runs the prompt once, and a batch of rows."""
    transcoders = Transcoders(model, asked.dictionaries)
    local = LocalModel(model, transcoders, torch.tensor(asked.tokens), skip_first=asked.skip_first)
    n_logits = len(asked.targets) or asked.max_logits
    costs = estimate(local, max_features=asked.max_features, n_logits=n_logits)
    return Estimate(
        memory_bytes=costs.memory_bytes,
        seconds=costs.seconds,
        passes=costs.n_rows,
        size=min(asked.max_features, costs.n_features) + (local.n_sources - costs.n_features) + n_logits,
        active_features=costs.n_features,
        stored_bytes=_EDGE_BYTES * costs.n_edges,
    )


def trace(model: GradientModel, asked: GraphRequest, progress: Progress) -> tuple[AttributionGraph, float]:
    """The graph, and the seconds it took."""
    started = perf_counter()
    transcoders = Transcoders(model, asked.dictionaries)
    tokens = torch.tensor(asked.tokens)
    logits = None
    if asked.targets:
        with torch.no_grad():
            logits = _targets(model, model.forward(model.tokens(tokens)).logits()[0], asked)
    graph = trace_graph(
        model,
        transcoders,
        tokens,
        logits=logits,
        desired_probability=asked.desired_probability,
        max_logits=asked.max_logits,
        max_features=asked.max_features,
        batch_size=asked.batch_size,
        update_interval=asked.update_interval,
        skip_first=asked.skip_first,
        progress=progress,
    )
    return graph, perf_counter() - started


def _targets(model: GradientModel, logits_V: Tensor, asked: GraphRequest) -> list[LogitTarget] | None:
    if not asked.targets:
        return None
    probabilities = torch.softmax(logits_V.float(), dim=-1)
    found = []
    for target in asked.targets:
        if target.token_id is not None:
            vector = logit_vector(model, target.token_id)
            weight = float(probabilities[target.token_id]) if target.weight is None else target.weight
        else:
            assert target.vector is not None and target.weight is not None, "checked where it was asked"
            vector, weight = target.vector.to(logits_V.device), target.weight
        found.append(LogitTarget(label=target.label, weight=weight, vector=vector, token_id=target.token_id))
    return found


def graph_facts(
    graph: AttributionGraph,
    *,
    title: str,
    model: str,
    names: Sequence[str],
    strings: Callable[..., Any],
    seconds: float,
) -> dict[str, Any]:
    """What is stored of a graph beside its arrays; JSON values. `strings`: token ids to their strings."""
    scores = graph.scores()
    tokens = graph.tokens.tolist()
    return {
        "model": model,
        "title": title,
        "token_ids": tokens,
        "tokens": strings(tokens),
        "transcoders": list(names),
        "n_layers": graph.n_layers,
        "n_features": len(graph.features),
        "n_active": graph.n_active,
        "n_edges": int(graph.edges.weights.numel()),
        "logits": [
            {
                "label": logit.label if logit.token_id is None else strings([logit.token_id])[0],
                "weight": logit.weight,
                "token_id": logit.token_id,
            }
            for logit in graph.logits
        ],
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "pinned": [],
        "supernodes": [],
        "seconds": seconds,
    }


def graph_tensors(graph: AttributionGraph) -> dict[str, Tensor]:
    """A graph's arrays; with `graph_facts` it is whole again by `stored_graph`."""
    features, edges = graph.features, graph.edges
    return {
        "feature_layers": features.layers.int(),
        "feature_positions": features.positions.int(),
        "feature_indices": features.indices.int(),
        "feature_dictionaries": features.dictionaries.int(),
        "feature_ids": features.ids.int(),
        "feature_values": features.values.float(),
        "edge_targets": edges.targets.int(),
        "edge_sources": edges.sources.int(),
        "edge_weights": edges.weights.float(),
        "logit_vectors": torch.stack([logit.vector.float() for logit in graph.logits]),
    }


def stored_graph(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AttributionGraph:
    """A graph as it was traced."""
    tokens = torch.tensor(facts["token_ids"])
    logits = tuple(
        LogitTarget(label=logit["label"], weight=logit["weight"], vector=vector, token_id=logit["token_id"])
        for logit, vector in zip(facts["logits"], tensors["logit_vectors"], strict=True)
    )
    n_nodes = facts["n_features"] + (facts["n_layers"] + 1) * tokens.numel() + len(logits)
    whole = {
        name: tensors[f"feature_{name}"] for name in ("layers", "positions", "indices", "dictionaries", "ids")
    }
    return AttributionGraph(
        tokens=tokens,
        features=ActiveFeatures(
            **{name: tensor.long() for name, tensor in whole.items()}, values=tensors["feature_values"]
        ),
        n_layers=facts["n_layers"],
        logits=logits,
        edges=Edges(
            targets=tensors["edge_targets"],
            sources=tensors["edge_sources"],
            weights=tensors["edge_weights"],
            n_nodes=n_nodes,
        ),
        n_active=facts["n_active"],
    )
