"""Influence in an attribution graph, its pruning and its scores, on sparse edges.

Edges are parallel arrays (targets, sources, weights); the graph is acyclic.

1. N = |A| with every target's incoming weights divided by their sum (at least 1e-10).
2. Influence of a node = w (N + N^2 + ...), w the logits' probabilities: sums end with the longest path.
3. Node pruning: keep the nodes, strongest first, up to the one where the cumulative share of influence reaches the
   threshold; tokens and logits always. Then N anew on what is left.
4. Edge pruning: an edge's score is N'[t, s] * (influence'(t) + w(t)); the same rule with the edge threshold.
5. Until nothing changes: features and errors without an outgoing edge go, and features without an incoming one.

replacement score = influence(tokens) / (influence(tokens) + influence(errors)): how much of the graph runs through
features from end to end. completeness = sum_t (1 - incoming error share(t)) (influence + w)(t) / sum_t (influence + w)(t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-10


@dataclass(frozen=True, kw_only=True, eq=False)
class Edges:
    """targets, sources: (E,) int64 node numbers. weights: (E,) float32. n_nodes counts all nodes."""

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
        magnitudes = self.weights.abs()
        sums = torch.zeros(self.n_nodes, device=magnitudes.device).index_add_(0, self.targets, magnitudes)
        return magnitudes / sums.clamp_min(_LEAST)[self.targets]

    def influence(self, start: Tensor) -> Tensor:
        """(n_nodes,): how much of `start` (n_nodes,) flows back through every node."""
        shares = self.shares()
        total, current = torch.zeros_like(start), start
        for _ in range(self.n_nodes + 1):
            flowing = current[self.targets] * shares
            if not bool(flowing.any()):
                return total
            current = torch.zeros_like(start).index_add_(0, self.sources, flowing)
            total = total + current
        raise AssertionError("an attribution graph has no cycles")


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
    ordered = scores.sort(descending=True).values
    shares = ordered.cumsum(0) / ordered.sum().clamp_min(_LEAST)
    cut = int(torch.searchsorted(shares, torch.tensor(threshold, device=shares.device)))
    return scores >= ordered[min(cut, len(ordered) - 1)]


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
    kept = nodes[edges.targets] & nodes[edges.sources]
    left = edges.select(kept)
    scores = left.shares() * (left.influence(weights) + weights)[left.targets]
    kept[kept.clone()] = above_threshold(scores, edge_threshold)
    while True:
        out = torch.zeros_like(nodes).index_fill_(0, edges.sources[kept], True)
        into = torch.zeros_like(nodes).index_fill_(0, edges.targets[kept], True)
        fewer = nodes & (out | ~optional) & (into | ~is_feature)
        if torch.equal(fewer, nodes):
            break
        nodes = fewer
        kept &= nodes[edges.targets] & nodes[edges.sources]
    return Pruning(nodes=nodes, edges=kept, cumulative=_cumulative(influence))


def graph_scores(edges: Edges, weights: Tensor, *, is_token: Tensor, is_error: Tensor) -> Scores:
    """Replacement and completeness of a graph (pruned or not)."""
    influence = edges.influence(weights)
    tokens, errors = float(influence[is_token].sum()), float(influence[is_error].sum())
    shares = edges.shares() * is_error[edges.sources]
    from_errors = torch.zeros_like(influence).index_add_(0, edges.targets, shares)
    importance = influence + weights
    has_input = torch.zeros_like(is_error).index_fill_(0, edges.targets, True)
    whole = float(importance[has_input].sum())
    explained = float(((1 - from_errors) * importance)[has_input].sum())
    return Scores(
        replacement=tokens / (tokens + errors) if tokens + errors else float("nan"),
        completeness=explained / whole if whole else float("nan"),
    )


def _cumulative(influence: Tensor) -> Tensor:
    order = influence.argsort(descending=True)
    shares = influence[order].cumsum(0) / influence.sum().clamp_min(_LEAST)
    found = torch.empty_like(influence)
    found[order] = shares
    return found
