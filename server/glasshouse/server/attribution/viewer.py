"""An attribution graph as the JSON that existing graph viewers read.

Nodes follow the kinds below; links carry the signed edge weights; a node's `influence` is the cumulative share of
influence at its rank (small is important). An error node of layer l shares its viewer id with feature l of layer 0
at the same position, so inside this package nodes are known by number.

| feature_type                 | node_id           | feature           | layer  |
|------------------------------|-------------------|-------------------|--------|
| cross layer transcoder       | {l}_{index}_{pos} | Cantor(l, index)  | l      |
| mlp reconstruction error     | 0_{l}_{pos}       | -1                | l      |
| embedding                    | E_{token}_{pos}   | pos               | E      |
| logit                        | {L+1}_{token}_{p} | token             | L+1    |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glasshouse.server.attribution.attribution_graph import AttributionGraph, LogitTarget
from glasshouse.server.attribution.influence import Pruning

FEATURE, ERROR, TOKEN, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"


@dataclass(frozen=True, kw_only=True)
class GraphCard:
    """What the viewer shows around a graph. `supernodes`: lists of a label and node ids, kept as they are."""

    slug: str
    scan: str
    prompt: str
    prompt_tokens: tuple[str, ...]
    transcoders: tuple[str, ...] = ()
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    info: Mapping[str, Any] = field(default_factory=dict)
    generation_settings: Mapping[str, Any] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    supernodes: tuple[Sequence[str], ...] = ()


def cantor(layer: int, index: int) -> int:
    """One number for a pair: (l + i)(l + i + 1) / 2 + i."""
    return (layer + index) * (layer + index + 1) // 2 + index


def viewer_graph(
    graph: AttributionGraph, pruning: Pruning, card: GraphCard, token_string: Callable[[int], str]
) -> dict[str, Any]:
    """The pruned graph as one JSON-ready object. `token_string` names a token id."""
    writer = _Nodes(graph, pruning, card, token_string)
    numbers = pruning.nodes.nonzero().squeeze(1).tolist()
    ids = {number: writer.node_id(number) for number in numbers}
    edges = graph.edges.select(pruning.edges)
    links = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(
            edges.sources.tolist(), edges.targets.tolist(), edges.weights.tolist()
        )
        if source in ids and target in ids
    ]
    return {
        "metadata": {
            "slug": card.slug,
            "scan": card.scan,
            "transcoder_list": list(card.transcoders),
            "prompt_tokens": list(card.prompt_tokens),
            "prompt": card.prompt,
            "node_threshold": card.node_threshold,
            "schema_version": 1,
            "info": dict(card.info),
            "generation_settings": dict(card.generation_settings),
            "pruning_settings": {
                "node_threshold": card.node_threshold,
                "edge_threshold": card.edge_threshold,
            },
        },
        "qParams": {
            "pinnedIds": list(card.pinned),
            "supernodes": [list(supernode) for supernode in card.supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [writer.node(number) for number in numbers],
        "links": links,
    }


class _Nodes:
    """Node numbers to viewer nodes."""

    def __init__(
        self, graph: AttributionGraph, pruning: Pruning, card: GraphCard, token_string: Callable[[int], str]
    ) -> None:
        self._graph, self._card, self._string = graph, card, token_string
        features = graph.features
        self._layers, self._positions = features.layers.tolist(), features.positions.tolist()
        self._indices, self._values = features.indices.tolist(), features.values.tolist()
        self._tokens = graph.tokens.tolist()
        self._cumulative = pruning.cumulative.tolist()
        self._best = max((logit.weight for logit in graph.logits), default=0.0)

    def _place(self, number: int) -> tuple[str, int, int]:
        """(kind, layer, position or number among the logits)."""
        graph = self._graph
        if number < graph.first_error:
            return FEATURE, self._layers[number], self._positions[number]
        if number < graph.first_token:
            return ERROR, *divmod(number - graph.first_error, graph.n_positions)
        if number < graph.first_logit:
            return TOKEN, -1, number - graph.first_token
        return LOGIT, graph.n_layers + 1, number - graph.first_logit

    def node_id(self, number: int) -> str:
        kind, layer, place = self._place(number)
        if kind == FEATURE:
            return f"{layer}_{self._indices[number]}_{place}"
        if kind == ERROR:
            return f"0_{layer}_{place}"
        if kind == TOKEN:
            return f"E_{self._tokens[place]}_{place}"
        return f"{layer}_{self._logit_number(place)}_{self._graph.n_positions - 1}"

    def node(self, number: int) -> dict[str, Any]:
        kind, layer, place = self._place(number)
        n_positions, node_id = self._graph.n_positions, self.node_id(number)
        position = n_positions - 1 if kind == LOGIT else place
        shown = {
            "node_id": node_id,
            "feature": -1,
            "layer": "E" if kind == TOKEN else str(layer),
            "ctx_idx": position,
            "feature_type": kind,
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{node_id}-0",
            "clerp": "",
            "influence": None if kind in (TOKEN, LOGIT) else self._cumulative[number],
            "activation": None,
        }
        if kind == FEATURE:
            shown |= {"feature": cantor(layer, self._indices[number]), "activation": self._values[number]}
        elif kind == ERROR:
            shown["clerp"] = f"Err: mlp {self._token_at(position)!r}"
        elif kind == TOKEN:
            shown |= {"feature": place, "clerp": f"Emb: {self._token_at(place)!r}"}
        else:
            logit = self._graph.logits[place]
            shown |= {
                "feature": self._logit_number(place),
                "token_prob": logit.weight,
                "is_target_logit": logit.weight == self._best,
                "clerp": f"Output {self._label(logit)!r} (p={logit.weight:.3f})",
            }
        return shown

    def _logit_number(self, place: int) -> int:
        """A token's id; for a target of the caller's own a negative number."""
        token = self._graph.logits[place].token_id
        return -1 - place if token is None else token

    def _label(self, logit: LogitTarget) -> str:
        return logit.label if logit.token_id is None else self._string(logit.token_id)

    def _token_at(self, position: int) -> str:
        strings = self._card.prompt_tokens
        return strings[position] if position < len(strings) else self._string(self._tokens[position])
