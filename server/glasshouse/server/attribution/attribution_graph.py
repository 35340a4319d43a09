"""An attribution graph: nodes in one order, sparse edges, and how it is traced.

Nodes: [features | errors, layer-major: l * T + p | tokens | logits]. An edge's weight is the direct effect of the
source (its activation, error or embedding as it is) on the target's pre-activation or demeaned logit.

1. `LocalModel`: features, errors, embeddings of the prompt.
2. Logit targets: the smallest set of top tokens whose probabilities (after the soft cap) reach
   `desired_probability`, at most `max_logits`; or the caller's own.
3. Rows for the logits, then for features. Where there are more active features than `max_features`, the next
   `update_interval * batch_size` are always the most influential by the rows so far.
4. Rows are computed layer by layer in order of position, as many at once as `BATCH_BYTES` allows.
5. Rows are kept sparse: a target hears only from earlier layers and positions. Columns of features that were not
   selected are dropped at the end.

`graph_estimate` says what a trace will hold and take before it starts.

Shapes: T positions, L layers, n active features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.influence import LEAST, Edges, Pruning, Scores, graph_scores, prune
from glasshouse.server.attribution.local_model import LocalModel, logit_vectors
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

BATCH_BYTES = 32 << 20
"""What the gradients of one batch of rows take, roughly; its rows over all sources as much again at most."""

MOST_ROWS = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitTarget:
    """`weight` is the token's probability, or the caller's. vector: (D,), injected after the final norm."""

    label: str
    weight: float
    vector: Tensor
    token_id: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributionGraph:
    """tokens: (T,). features: the selected ones. Node numbers: see above."""

    tokens: Tensor
    features: ActiveFeatures
    n_layers: int
    logits: tuple[LogitTarget, ...]
    edges: Edges
    n_active: int

    @property
    def n_positions(self) -> int:
        return int(self.tokens.numel())

    @property
    def first_error(self) -> int:
        return len(self.features)

    @property
    def first_token(self) -> int:
        return self.first_error + self.n_layers * self.n_positions

    @property
    def first_logit(self) -> int:
        return self.first_token + self.n_positions

    @property
    def weights(self) -> Tensor:
        """(n_nodes,): the logits' weights, zero elsewhere."""
        w = torch.zeros(self.edges.n_nodes, device=self.tokens.device)
        w[self.first_logit :] = torch.tensor([logit.weight for logit in self.logits])
        return w

    def _mask(self, start: int, stop: int) -> Tensor:
        mask = torch.zeros(self.edges.n_nodes, dtype=torch.bool, device=self.tokens.device)
        mask[start:stop] = True
        return mask

    @property
    def is_feature(self) -> Tensor:
        return self._mask(0, self.first_error)

    @property
    def is_error(self) -> Tensor:
        return self._mask(self.first_error, self.first_token)

    @property
    def is_token(self) -> Tensor:
        return self._mask(self.first_token, self.first_logit)

    def prune(self, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruning:
        """Which nodes and edges matter; see `influence`."""
        for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0.0 < value <= 1.0:
                raise InvalidArgument(
                    f"{name} is {value}",
                    reason=reasons.VALUE_OUT_OF_RANGE,
                    field=name,
                    value=value,
                    remedy="Use a share of the influence, above 0 and at most 1.",
                )
        return prune(
            self.edges,
            self.weights,
            is_feature=self.is_feature,
            is_error=self.is_error,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
        )

    def scores(self, pruning: Pruning | None = None) -> Scores:
        """Of the whole graph, or of what a pruning left."""
        edges = self.edges if pruning is None else self.edges.select(pruning.edges)
        return graph_scores(edges, self.weights, is_token=self.is_token, is_error=self.is_error)

    def adjacency(self) -> Tensor:
        """(n_nodes, n_nodes) dense, rows = targets: only for small graphs and tests."""
        dense = torch.zeros(self.edges.n_nodes, self.edges.n_nodes, device=self.tokens.device)
        dense[self.edges.targets.long(), self.edges.sources.long()] = self.edges.weights
        return dense


def top_logits(
    model: GradientModel, logits_V: Tensor, *, desired_probability: float = 0.95, max_logits: int = 10
) -> list[LogitTarget]:
    """The fewest likeliest tokens that reach `desired_probability`, at most `max_logits`."""
    probabilities, ids = torch.softmax(logits_V.float(), dim=-1).topk(min(max_logits, logits_V.numel()))
    before = probabilities.cumsum(0) - probabilities
    n = int((before < desired_probability).sum())
    vectors = logit_vectors(model, ids[:n].tolist())
    return [
        LogitTarget(label=str(token), weight=p, vector=vector, token_id=token)
        for token, p, vector in zip(ids[:n].tolist(), probabilities[:n].tolist(), vectors)
    ]


def trace_graph(
    model: GradientModel,
    transcoders: Transcoders,
    tokens_T: Tensor,
    *,
    logits: Sequence[LogitTarget] | None = None,
    desired_probability: float = 0.95,
    max_logits: int = 10,
    max_features: int = 4096,
    batch_size: int = 64,
    update_interval: int = 4,
    skip_first: bool = True,
    progress: Progress = silent,
) -> AttributionGraph:
    """Trace the attribution graph of one prompt's next token."""
    local = LocalModel(model, transcoders, tokens_T, skip_first=skip_first)
    if logits is None:
        logits = top_logits(
            model, local.logits, desired_probability=desired_probability, max_logits=max_logits
        )
    return _Trace(local, logits, progress).run(max_features, batch_size, update_interval)


def rows_at_once(local: LocalModel, n_positions: Tensor) -> int:
    """How many of the next rows, with so many positions each (in order), make a batch: at least one."""
    rows = torch.arange(1, len(n_positions) + 1, device=n_positions.device)
    gradients = 4 * rows * n_positions * local.model.loaded.d_model
    return max(1, int(((gradients <= BATCH_BYTES // 4) & (4 * rows * local.n_sources <= BATCH_BYTES)).sum()))


class _Trace:
    """Rows computed so far, numbered as the full graph of all active features.

    A chunk holds the rows of targets of one layer at one position, which hear from the same sources.
    """

    def __init__(self, local: LocalModel, logits: Sequence[LogitTarget], progress: Progress) -> None:
        self._local, self._logits, self._progress = local, tuple(logits), progress
        self._n_features = len(local.features)
        self._n_nodes = local.n_sources + len(logits)
        self._chunks: dict[int, list[_Chunk]] = {}
        self._visited = torch.zeros(self._n_features, dtype=torch.bool, device=local.tokens.device)

    def run(self, max_features: int, batch_size: int, update_interval: int) -> AttributionGraph:
        local, n_wanted = self._local, min(max_features, self._n_features)
        total, done = n_wanted + len(self._logits), len(self._logits)
        if self._logits:
            vectors = torch.stack([logit.vector for logit in self._logits])
            numbers = torch.arange(len(vectors), device=vectors.device) + local.n_sources
            positions = torch.full_like(numbers, local.n_positions - 1)
            self._keep(local.model.n_layers, positions, numbers, local.logit_rows(vectors))
        self._progress(done, total)
        while (left := n_wanted - int(self._visited.sum())) > 0:
            every = n_wanted == self._n_features  # then none has to be ranked
            chosen = self._next(left if every else min(left, update_interval * batch_size))
            for batch in self._batches(chosen):
                layer = int(local.features.layers[batch[0]])
                self._keep(layer, local.features.positions[batch], batch, local.feature_rows(batch))
                self._visited[batch] = True
                done += len(batch)
                self._progress(done, total)
        return self._graph()

    def _batches(self, chosen: Tensor) -> Iterator[Tensor]:
        """Features of one layer, in order of position, as many as a batch's memory allows."""
        local = self._local
        chosen = chosen.sort().values
        for layer in range(local.model.n_layers):
            low, high = local.first_of_layer[layer], local.first_of_layer[layer + 1]
            mine = chosen[(chosen >= low) & (chosen < high)]
            while len(mine):
                ahead = mine[:MOST_ROWS]
                n_positions = local.features.positions[ahead] + 1
                yield mine[: (n := rows_at_once(local, n_positions))]
                mine = mine[n:]

    def _keep(self, layer: int, positions: Tensor, numbers: Tensor, rows: Tensor) -> None:
        places, counts = positions.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        start = 0
        for position, count in zip(places.tolist(), counts.tolist()):
            sources = self._local.sources_of(layer, position)
            weights = rows[start : start + count].index_select(1, sources)
            chunk = _Chunk(targets=numbers[start : start + count], sources=sources, weights=weights)
            self._chunks.setdefault(layer, []).append(chunk)
            start += count

    def _next(self, n: int) -> Tensor:
        """The n most influential features not visited; all that are left need no ranking."""
        candidates = (~self._visited).nonzero().squeeze(1)
        if n >= candidates.numel():
            return candidates
        return candidates[self._influence()[candidates].topk(n).indices]

    def _influence(self) -> Tensor:
        """(n_nodes,) by the rows so far: a layer's targets are done before any that they hear from."""
        importance = torch.zeros(self._n_nodes, device=self._visited.device)
        importance[self._local.n_sources :] = torch.tensor([logit.weight for logit in self._logits])
        for layer in sorted(self._chunks, reverse=True):
            for chunk in self._chunks[layer]:
                importance.index_add_(0, chunk.sources, chunk.flow(importance[chunk.targets]))
        return importance

    def _graph(self) -> AttributionGraph:
        local, chosen = self._local, self._visited.nonzero().squeeze(1)
        number = torch.full((self._n_nodes,), -1, dtype=torch.int32, device=chosen.device)
        number[chosen] = torch.arange(chosen.numel(), dtype=torch.int32, device=chosen.device)
        rest = self._n_nodes - self._n_features
        number[self._n_features :] = torch.arange(rest, dtype=torch.int32, device=chosen.device) + len(chosen)
        return AttributionGraph(
            tokens=local.tokens[0],
            features=local.features.select(chosen),
            n_layers=local.model.n_layers,
            logits=self._logits,
            edges=self._edges(number, len(chosen) + rest),
            n_active=self._n_features,
        )

    def _edges(self, number: Tensor, n_nodes: int) -> Edges:
        """All chunks as one list, emptied as it goes. `number`: the nodes' numbers in the graph, -1 where left out."""
        chunks = [chunk for layer in sorted(self._chunks) for chunk in self._chunks.pop(layer)]
        n_edges = sum(int((number[chunk.sources] >= 0).sum()) * len(chunk.targets) for chunk in chunks)
        device = number.device
        targets = torch.empty(n_edges, dtype=torch.int32, device=device)
        sources = torch.empty(n_edges, dtype=torch.int32, device=device)
        weights = torch.empty(n_edges, device=device)
        end = 0
        for place, chunk in enumerate(chunks):
            chunks[place] = None  # type: ignore[call-overload]
            renumbered = number[chunk.sources]
            keep = renumbered >= 0
            whole = bool(keep.all())
            found = chunk.weights if whole else chunk.weights[:, keep]
            some = (renumbered if whole else renumbered[keep]).expand_as(found)
            own = number[chunk.targets][:, None].expand_as(found)
            live = found != 0
            start, end = end, end + int(live.sum())
            targets[start:end], sources[start:end] = own[live], some[live]
            weights[start:end] = found[live]
        return Edges(targets=targets[:end], sources=sources[:end], weights=weights[:end], n_nodes=n_nodes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """targets: (n,) int64; sources: (m,) int32; weights: (n, m)."""

    targets: Tensor
    sources: Tensor
    weights: Tensor

    def flow(self, importance: Tensor) -> Tensor:
        """(m,): how much of the targets' importance (n,) comes from each source."""
        magnitudes = self.weights.abs()
        return (importance / magnitudes.sum(1).clamp_min(LEAST)) @ magnitudes
