"""An attribution graph: nodes in one order, sparse edges, and how it is traced.

Nodes: [features | errors, layer-major: l * T + p | tokens | logits]. An edge's weight is the direct effect of the
source (its activation, error or embedding as it is) on the target's pre-activation or demeaned logit.

1. `LocalModel`: features, errors, embeddings of the prompt.
2. Logit targets: the smallest set of top tokens whose probabilities (after the soft cap) reach
   `desired_probability`, at most `max_logits`; or the caller's own.
3. Rows for the logits, then for features, `batch_size` at a time through one linear pass. Where there are more
   active features than `max_features`, the next ones are always the most influential by the rows so far, re-ranked
   every `update_interval` batches.
4. Rows are kept sparse (a target hears only from earlier layers and positions). Columns of features that were not
   selected are dropped at the end.

`estimate` says what a trace will hold before it starts. Shapes: T positions, L layers, n active features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.influence import Edges, Pruning, Scores, graph_scores, prune
from glasshouse.server.attribution.local_model import LocalModel, Target, logit_vector
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.transcoders import ActiveFeatures, Transcoders
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitTarget:
    """`weight` is the token's probability, or the caller's. vector: (D,), injected after the final norm."""

    label: str
    weight: float
    vector: Tensor
    token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Upper bounds: rows to compute, bytes of edges, bytes of the gathered decoder rows."""

    n_features: int
    n_rows: int
    edge_bytes: int
    decoder_bytes: int


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
        dense[self.edges.targets, self.edges.sources] = self.edges.weights
        return dense


def estimate(local: LocalModel, *, max_features: int, n_logits: int) -> Estimate:
    """What a trace of this prompt will cost, before it starts."""
    n_active, d_model = len(local.features), local.model.loaded.d_model
    n_rows = min(max_features, n_active) + n_logits
    per_edge = 8 + 8 + 4
    return Estimate(
        n_features=n_active,
        n_rows=n_rows,
        edge_bytes=n_rows * local.n_sources * per_edge,
        decoder_bytes=n_active * d_model * 4 * len(local.transcoders.written),
    )


def top_logits(
    model: GradientModel, logits_V: Tensor, *, desired_probability: float = 0.95, max_logits: int = 10
) -> list[LogitTarget]:
    """The fewest likeliest tokens that reach `desired_probability`, at most `max_logits`."""
    probabilities, ids = torch.softmax(logits_V.float(), dim=-1).topk(min(max_logits, logits_V.numel()))
    before = probabilities.cumsum(0) - probabilities
    n = int((before < desired_probability).sum())
    return [
        LogitTarget(label=str(token), weight=p, vector=logit_vector(model, token), token_id=token)
        for token, p in zip(ids[:n].tolist(), probabilities[:n].tolist())
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
    return _Trace(local, logits, batch_size, progress).run(max_features, update_interval)


class _Trace:
    """Rows computed so far, numbered as the full graph of all active features."""

    def __init__(
        self, local: LocalModel, logits: Sequence[LogitTarget], batch_size: int, progress: Progress
    ) -> None:
        self._local, self._logits, self._batch_size, self._progress = (
            local,
            tuple(logits),
            batch_size,
            progress,
        )
        self._n_features = len(local.features)
        self._n_nodes = local.n_sources + len(logits)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._visited = torch.zeros(self._n_features, dtype=torch.bool, device=local.tokens.device)

    def run(self, max_features: int, update_interval: int) -> AttributionGraph:
        local, n_wanted = self._local, min(max_features, self._n_features)
        run, n_rows = local.linear_pass(), self._batch_size
        total, done = n_wanted + len(self._logits), 0
        last = local.tokens.shape[1] - 1
        targets = [Target(hook_point=None, position=last, vector=logit.vector) for logit in self._logits]
        for first in range(0, len(targets), n_rows):
            some = targets[first : first + n_rows]
            self._keep(local.rows(run, some), torch.arange(len(some)) + local.n_sources + first)
            done += len(some)
            self._progress(done, total)
        while (left := n_wanted - int(self._visited.sum())) > 0:
            for batch in torch.split(self._next(min(left, update_interval * n_rows)), n_rows):
                self._keep(local.rows(run, [local.feature_target(int(i)) for i in batch]), batch)
                self._visited[batch] = True
                done += len(batch)
                self._progress(done, total)
        return self._graph()

    def _keep(self, rows: Tensor, numbers: Tensor) -> None:
        row, source = rows.nonzero(as_tuple=True)
        self._parts.append((numbers.to(row.device)[row], source, rows[row, source]))

    def _edges(self) -> Edges:
        targets, sources, weights = (torch.cat(parts) for parts in zip(*self._parts))
        return Edges(targets=targets, sources=sources, weights=weights, n_nodes=self._n_nodes)

    def _next(self, n: int) -> Tensor:
        """The n most influential features not visited; all that are left need no ranking."""
        candidates = (~self._visited).nonzero().squeeze(1)
        if n >= candidates.numel():
            return candidates
        start = torch.zeros(self._n_nodes, device=candidates.device)
        start[self._local.n_sources :] = torch.tensor([logit.weight for logit in self._logits])
        influence = self._edges().influence(start)[candidates]
        return candidates[influence.topk(n).indices]

    def _graph(self) -> AttributionGraph:
        local, chosen = self._local, self._visited.nonzero().squeeze(1)
        edges = self._edges()
        number = torch.full((self._n_nodes,), -1, dtype=torch.int64, device=chosen.device)
        number[chosen] = torch.arange(chosen.numel(), device=chosen.device)
        rest = self._n_nodes - self._n_features
        number[self._n_features :] = torch.arange(rest, device=chosen.device) + chosen.numel()
        keep = (number[edges.targets] >= 0) & (number[edges.sources] >= 0)
        return AttributionGraph(
            tokens=local.tokens[0],
            features=local.features.select(chosen),
            n_layers=local.model.n_layers,
            logits=self._logits,
            edges=Edges(
                targets=number[edges.targets[keep]],
                sources=number[edges.sources[keep]],
                weights=edges.weights[keep],
                n_nodes=int(chosen.numel()) + rest,
            ),
            n_active=self._n_features,
        )
