"""Influence in an attribution graph, its pruning and its scores, on sparse edges.

Edges are parallel arrays (targets, sources, weights); the graph is acyclic.

1. N = |A| with every target's incoming weights divided by their sum (at least 1e-10).
2. Influence of a node = w (N + N^2 + ...), w the logits' probabilities: sums end with the longest path.
3. Node pruning: keep the nodes, strongest first, up to the one where the cumulative share of influence reaches the
   threshold; tokens and logits always. Then N anew on what is left.
4. Edge pruning: an edge's score is N'[t, s] * (influence'(t) + w(t)); the same rule with the edge threshold.
5. Until nothing changes: features and errors without an outgoing edge go, and features without an incoming one.

replacement score = influence(tokens) / (influence(tokens) + influence(errors)): how much of the graph runs through
features from end to end. completeness = sum_t (1 - incoming error share(t)) (influence + w)(t) / sum_t (influence + w)(t),
over all nodes: those without incoming edges, errors too, count as explained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-10
SORTED_AT_ONCE = 4096
EDGES_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Edges:
    """targets, sources: (E,) int32 node numbers. weights: (E,) float32. n_nodes counts all nodes."""

    targets: Tensor
    sources: Tensor
    weights: Tensor
    n_nodes: int

    def select(self, keep: Tensor) -> Edges:
        """The edges where `keep` (E,) is True."""
        return Edges(
            targets=self.targets[keep],
            sources=self.sources[keep],
            weights=self.weights[keep],
            n_nodes=self.n_nodes,
        )

    def shares(self) -> Tensor:
        """(E,): |weight| over the sum of the target's incoming |weights|."""
        return self.weights.abs().mul_(self._per_weight().index_select(0, self.targets))

    def influence(self, start: Tensor) -> Tensor:
        """(n_nodes,): how much of `start` (n_nodes,) flows back through every node."""
        per_weight = self._per_weight()
        total, current = torch.zeros_like(start), start
        for _ in range(self.n_nodes + 1):
            scaled, current = current * per_weight, torch.zeros_like(start)
            for targets, sources, weights in self._pieces():
                flowing = scaled.index_select(0, targets).mul_(weights.abs())
                current.index_add_(0, sources, flowing)
            if not bool(current.any()):
                return total
            total = total + current
        raise AssertionError("an attribution graph has no cycles")

    def share_from(self, sources: Tensor) -> Tensor:
        """(n_nodes,): of each node's incoming shares, how much comes from `sources` (n_nodes,) bool."""
        found, wanted = torch.zeros(self.n_nodes, device=self.weights.device), sources.float()
        for targets, places, weights in self._pieces():
            found.index_add_(0, targets, weights.abs().mul_(wanted.index_select(0, places)))
        return found.mul_(self._per_weight())

    def between(self, nodes: Tensor) -> Tensor:
        """(E,) bool: the edges with both ends among `nodes` (n_nodes,) bool."""
        return nodes.index_select(0, self.targets) & nodes.index_select(0, self.sources)

    def _per_weight(self) -> Tensor:
        """(n_nodes,): one over the sum of a target's incoming |weights|."""
        sums = torch.zeros(self.n_nodes, device=self.weights.device)
        for targets, _, weights in self._pieces():
            sums.index_add_(0, targets, weights.abs())
        return sums.clamp_min_(LEAST).reciprocal_()

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """So many edges at a time that what is made of them stays small."""
        yield from zip(
            torch.split(self.targets, EDGES_AT_ONCE),
            torch.split(self.sources, EDGES_AT_ONCE),
            torch.split(self.weights, EDGES_AT_ONCE),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruning:
    """nodes: (n_nodes,) bool. edges: (E,) bool. cumulative: (n_nodes,), the share of influence at a node's rank."""

    nodes: Tensor
    edges: Tensor
    cumulative: Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Both from 0 to 1."""

    replacement: float
    completeness: float


def above_threshold(scores: Tensor, threshold: float) -> Tensor:
    """bool, as `scores`: those at least as large as the one where the cumulative share reaches `threshold`."""
    if threshold >= 1.0 or not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    return scores >= _cut(scores, threshold * float(scores.double().sum()))


def _cut(scores: Tensor, wanted: float) -> float:
    """The largest score such that it and all above it sum to at least `wanted`; the least one where none do.

    Quickselect by weight: the half that cannot hold the cut is put away unsorted, so the work is linear.
    """
    while len(scores) > SORTED_AT_ONCE:
        pivot = scores.median()
        high = scores[scores > pivot]
        above = float(high.double().sum())
        if not 0 < len(high) < len(scores):
            break  # all alike
        if above >= wanted:
            scores = high
        else:
            scores, wanted = scores[scores <= pivot], wanted - above
    ordered = scores.sort(descending=True).values
    place = int((ordered.double().cumsum(0) < wanted).sum())
    return float(ordered[min(place, len(ordered) - 1)])


def prune(
    edges: Edges,
    weights: Tensor,
    *,
    is_feature: Tensor,
    is_error: Tensor,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Pruning:
    """Which nodes and edges stay. `weights` (n_nodes,) is w; the masks say what a node is, the rest always stay."""
    influence = edges.influence(weights)
    optional = is_feature | is_error
    nodes = above_threshold(influence, node_threshold) | ~optional
    kept = edges.between(nodes)
    left = edges.select(kept)
    scores = left.shares() * (left.influence(weights) + weights).index_select(0, left.targets)
    strong = above_threshold(scores, edge_threshold)
    kept[kept.clone()] = strong
    left = left.select(strong)
    while True:
        out, into = _marked(nodes, left.sources), _marked(nodes, left.targets)
        fewer = nodes & (out | ~optional) & (into | ~is_feature)
        if torch.equal(fewer, nodes):
            break
        nodes = fewer
        still = left.between(nodes)
        kept[kept.clone()] = still
        left = left.select(still)
    return Pruning(nodes=nodes, edges=kept, cumulative=_cumulative(influence))


def graph_scores(edges: Edges, weights: Tensor, *, is_token: Tensor, is_error: Tensor) -> Scores:
    """Replacement and completeness of a graph (pruned or not)."""
    influence = edges.influence(weights)
    tokens, errors = float(influence[is_token].sum()), float(influence[is_error].sum())
    from_errors = edges.share_from(is_error)
    importance = influence + weights
    whole = float(importance.sum())
    explained = float(((1 - from_errors) * importance).sum())
    return Scores(
        replacement=tokens / (tokens + errors) if tokens + errors else float("nan"),
        completeness=explained / whole if whole else float("nan"),
    )


def _marked(like: Tensor, places: Tensor) -> Tensor:
    """bool (n_nodes,): True at these node numbers."""
    marks = torch.zeros_like(like)
    marks[places.long()] = True
    return marks


def _cumulative(influence: Tensor) -> Tensor:
    order = influence.argsort(descending=True)
    shares = influence[order].cumsum(0) / influence.sum().clamp_min(LEAST)
    found = torch.empty_like(influence)
    found[order] = shares
    return found
