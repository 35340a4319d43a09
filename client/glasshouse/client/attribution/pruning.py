"""Influence, pruning and scores of an attribution graph, in numpy: what the server computes, step for step.

Edges are parallel arrays (targets, sources, weights) of an acyclic graph. N = |A| with every target's incoming weights
divided by their sum; influence = w (N + N^2 + ...) with w the logits' weights.

1. Nodes: the strongest, up to the one where the cumulative share of influence reaches the threshold; tokens and
   logits always.
2. Edges, N anew on what is left: by N'[t, s] * (influence'(t) + w(t)), the same rule.
3. Until nothing changes: features and errors without an outgoing edge go, and features without an incoming one.

Sums are float32 in the order of the edges, as the server's are, so that both cut at the same node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST = np.float32(1e-10)

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Edges:
    """targets, sources: (E,) int32. weights: (E,) float32."""

    targets: Numbers
    sources: Numbers
    weights: Floats

    def __len__(self) -> int:
        return len(self.weights)

    def select(self, keep: Mask) -> Edges:
        """Those where `keep` (E,) is True."""
        return Edges(self.targets[keep], self.sources[keep], self.weights[keep])

    def between(self, nodes: Mask) -> Mask:
        """(E,): those with both ends among `nodes`."""
        return nodes[self.targets] & nodes[self.sources]

    def shares(self, n_nodes: int) -> Floats:
        """(E,): |weight| over the sum of the target's incoming |weights|."""
        shares: Floats = np.abs(self.weights) * self._per_weight(n_nodes)[self.targets]
        return shares

    def influence(self, start: Floats) -> Floats:
        """(n_nodes,): how much of `start` flows back through every node."""
        magnitudes, per_weight = np.abs(self.weights), self._per_weight(len(start))
        total, current = np.zeros_like(start), start
        for _ in range(len(start) + 1):
            flowing = (current * per_weight)[self.targets] * magnitudes
            current = np.zeros_like(start)
            np.add.at(current, self.sources, flowing)
            if not current.any():
                return total
            total = total + current
        raise ValueError("the graph has a cycle")

    def share_from(self, sources: Mask) -> Floats:
        """(n_nodes,): of each node's incoming shares, how much comes from `sources`."""
        found = np.zeros(len(sources), np.float32)
        np.add.at(found, self.targets, np.abs(self.weights) * sources.astype(np.float32)[self.sources])
        share: Floats = found * self._per_weight(len(sources))
        return share

    def _per_weight(self, n_nodes: int) -> Floats:
        sums = np.zeros(n_nodes, np.float32)
        np.add.at(sums, self.targets, np.abs(self.weights))
        inverse: Floats = np.reciprocal(np.maximum(sums, LEAST))
        return inverse


@dataclass(frozen=True)
class GraphScores:
    """How much of a graph is explained, from 0 to 1: how much of the influence runs through features from end to end, and
    how much of what nodes hear comes from no error.
    """

    replacement: float
    completeness: float


@dataclass(frozen=True)
class Pruning:
    """nodes: (n_nodes,). edges: (E,). cumulative: (n_nodes,) the share of influence at a node's rank."""

    nodes: Mask
    edges: Mask
    cumulative: Floats


def above_threshold(scores: Floats, threshold: float) -> Mask:
    """Those at least as large as the one where the cumulative share reaches `threshold`."""
    if threshold >= 1.0 or not len(scores):
        return np.ones(len(scores), dtype=np.bool_)
    ordered = np.sort(scores)[::-1]
    wanted = threshold * float(scores.astype(np.float64).sum())
    place = int((ordered.astype(np.float64).cumsum() < wanted).sum())
    strong: Mask = scores >= ordered[min(place, len(ordered) - 1)]
    return strong


def prune(
    edges: Edges,
    weights: Floats,
    *,
    is_feature: Mask,
    is_error: Mask,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Pruning:
    """Which nodes and edges stay; `weights` (n_nodes,) is w."""
    n_nodes = len(weights)
    influence = edges.influence(weights)
    optional = is_feature | is_error
    nodes = above_threshold(influence, node_threshold) | ~optional
    kept = edges.between(nodes)
    left = edges.select(kept)
    scores = left.shares(n_nodes) * (left.influence(weights) + weights)[left.targets]
    strong = above_threshold(scores, edge_threshold)
    kept[kept.copy()] = strong
    left = left.select(strong)
    while True:
        fewer = (
            nodes
            & (_marked(n_nodes, left.sources) | ~optional)
            & (_marked(n_nodes, left.targets) | ~is_feature)
        )
        if np.array_equal(fewer, nodes):
            break
        nodes = fewer
        still = left.between(nodes)
        kept[kept.copy()] = still
        left = left.select(still)
    return Pruning(nodes, kept, _cumulative(influence))


def graph_scores(edges: Edges, weights: Floats, *, is_token: Mask, is_error: Mask) -> GraphScores:
    """Of a graph, pruned or not."""
    influence = edges.influence(weights)
    tokens, errors = float(influence[is_token].sum()), float(influence[is_error].sum())
    importance = influence + weights
    whole = float(importance.sum())
    explained = float(((1 - edges.share_from(is_error)) * importance).sum())
    return GraphScores(
        replacement=tokens / (tokens + errors) if tokens + errors else float("nan"),
        completeness=explained / whole if whole else float("nan"),
    )


def cumulative_influence(edges: Edges, weights: Floats) -> Floats:
    """(n_nodes,): the share of influence at a node's rank; small is important."""
    return _cumulative(edges.influence(weights))


def _marked(n_nodes: int, places: Numbers) -> Mask:
    marks = np.zeros(n_nodes, dtype=np.bool_)
    marks[places] = True
    return marks


def _cumulative(influence: Floats) -> Floats:
    order = np.argsort(-influence, kind="stable")
    shares = influence[order].cumsum() / max(influence.sum(), LEAST)
    found = np.empty_like(influence)
    found[order] = shares
    return found
