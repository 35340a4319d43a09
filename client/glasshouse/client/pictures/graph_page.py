"""An attribution graph as one interactive page: no network, no library, light or dark.

The page is `graph/page.html` with its style, its script and the graph put in. Nodes are as the viewer's JSON has
them; edges, of which there may be hundreds of thousands, go in as packed arrays. What the page may hold is bounded:
of a larger graph the most influential nodes and the edges with the highest scores, as pruning ranks them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import numpy as np

from glasshouse.client.arrays import Array
from glasshouse.client.attribution.graph import AttributionGraph
from glasshouse.client.attribution.viewer import viewer_graph

MAX_NODES = 4_000
MAX_EDGES = 600_000
_SCRIPTS = ("graph.js", "pruning.js", "state.js", "scene.js", "draw.js", "panel.js", "main.js")
_ERROR, _TOKEN, _LOGIT = "mlp reconstruction error", "embedding", "logit"
_LEAST = 1e-10


@dataclass(frozen=True, kw_only=True)
class FeatureNote:
    """What is known of a feature. promoted, suppressed: pairs of a token and its logit."""

    label: str = ""
    dictionary: str = ""
    promoted: Sequence[tuple[str, float]] = ()
    suppressed: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Edges:
    """Parallel arrays: node numbers (m,) int64 and weights (m,) float32, ordered by target."""

    sources: Array
    targets: Array
    weights: Array

    def select(self, keep: Array) -> _Edges:
        return _Edges(sources=self.sources[keep], targets=self.targets[keep], weights=self.weights[keep])


@dataclass(frozen=True, kw_only=True, eq=False)
class _View:
    """A graph as the page draws it. `reach`: the thresholds it was pruned at. scores: of the whole graph, if known.
    `held`: at node thresholds, ascending, the share of the edges' scores among those nodes that the page holds.
    """

    nodes: list[Mapping[str, Any]]
    edges: _Edges
    metadata: dict[str, Any]
    marks: dict[str, Any]
    reach: dict[str, float]
    scores: dict[str, float] | None
    held: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ranks(self) -> Array:
        """(n,) int64: tokens below every layer, logits above."""
        kinds = [node["feature_type"] for node in self.nodes]
        layers = [0 if kind in (_TOKEN, _LOGIT) else int(n["layer"]) for n, kind in zip(self.nodes, kinds)]
        top = max(layers, default=0) + 1
        ranks = [-1 if kind == _TOKEN else top if kind == _LOGIT else at for kind, at in zip(kinds, layers)]
        return np.array(ranks, dtype=np.int64)


def graph_page(
    graph: AttributionGraph | Mapping[str, Any],
    *,
    notes: Mapping[tuple[int, int], FeatureNote] | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_nodes: int = MAX_NODES,
    max_edges: int = MAX_EDGES,
) -> str:
    """The page's HTML.

    `graph` is whole, or pruned, or in the viewer's JSON. `notes` tell of features by (layer, index). The sliders start at
    the thresholds, and reach to what the graph was pruned at. Raises ValueError where `graph` is not such a graph.
    """
    data = page_data(
        graph,
        notes=notes,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        max_nodes=max_nodes,
        max_edges=max_edges,
    )
    # "<" would end the script element early, were it in a token.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    page = _asset("page.html").replace("/*STYLE*/", _asset("style.css"))
    page = page.replace("/*SCRIPT*/", "\n".join(map(_asset, _SCRIPTS)))
    return page.replace("/*DATA*/", text)


def page_data(
    graph: AttributionGraph | Mapping[str, Any],
    *,
    notes: Mapping[tuple[int, int], FeatureNote] | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_nodes: int = MAX_NODES,
    max_edges: int = MAX_EDGES,
) -> dict[str, Any]:
    """What the page's script draws; arguments as `graph_page` has them."""
    view = _of_graph(graph) if isinstance(graph, AttributionGraph) else _of_json(graph)
    if len(view.nodes) > max_nodes:
        view = _strongest_nodes(view, max_nodes)
    if len(view.edges.weights) > max_edges:
        view = _strongest_edges(view, max_edges)
    number = np.dtype("<u4" if len(view.nodes) > 0xFFFF else "<u2")
    return {
        "metadata": view.metadata,
        "qParams": view.marks,
        "nodes": view.nodes,
        "features": {f"{layer}/{index}": _told(note) for (layer, index), note in (notes or {}).items()},
        "limits": view.reach,
        "held": view.held,
        "thresholds": {
            "node": min(node_threshold, view.reach["node"]),
            "edge": min(edge_threshold, view.reach["edge"]),
        },
        "scores": view.scores,
        "sources": _packed(view.edges.sources, number),
        "targets": _packed(view.edges.targets, number),
        "weights": _packed(view.edges.weights, np.dtype("<f4")),
    }


def _of_graph(graph: AttributionGraph) -> _View:
    """Nodes by number, so that no id stands for two of them."""
    edges = graph.edges
    bare = viewer_graph(graph.select(graph.kept, np.zeros(len(edges), dtype=np.bool_)))
    number = np.cumsum(graph.kept) - 1
    inside = edges.between(graph.kept)
    found = _Edges(
        sources=number[edges.sources[inside]],
        targets=number[edges.targets[inside]],
        weights=edges.weights[inside],
    )
    node_threshold, edge_threshold = graph.thresholds or (1.0, 1.0)
    scores = graph.info.scores
    return _View(
        nodes=bare["nodes"],
        edges=found.select(np.argsort(found.targets, kind="stable")),
        metadata=bare["metadata"],
        marks=bare["qParams"],
        reach={"node": node_threshold, "edge": edge_threshold},
        scores={"replacement": scores.replacement, "completeness": scores.completeness},
    )


def _of_json(graph: Mapping[str, Any]) -> _View:
    try:
        nodes, metadata = list(graph["nodes"]), dict(graph["metadata"])
        applied = metadata.get("pruning_settings") or {}
        view = _View(
            nodes=nodes,
            edges=_Edges(sources=np.zeros(0), targets=np.zeros(0), weights=np.zeros(0)),
            metadata=metadata,
            marks=dict(graph.get("qParams") or {}),
            reach={name: float(applied.get(f"{name}_threshold") or 1.0) for name in ("node", "edge")},
            scores=None,
        )
        return replace(view, edges=_numbered(view, graph["links"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an attribution graph: {error}") from None


def _asset(name: str) -> str:
    return resources.files("glasshouse.client.pictures").joinpath("graph", name).read_text(encoding="utf-8")


def _packed(values: Array, dtype: np.dtype[Any]) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")


def _told(note: FeatureNote) -> dict[str, Any]:
    return {
        "label": note.label,
        "dictionary": note.dictionary,
        "promoted": [[token, round(float(logit), 3)] for token, logit in note.promoted],
        "suppressed": [[token, round(float(logit), 3)] for token, logit in note.suppressed],
    }


def _numbered(view: _View, links: Sequence[Mapping[str, Any]]) -> _Edges:
    """Links between ids as edges between node numbers.

    An error of layer l shares its id with feature l of layer 0 at its position. Errors have no inputs, so a target
    is the feature; so is a source of a target at or below the error's layer. Of two links between the same ids the
    feature's comes first, as nodes do.
    """
    features: dict[str, int] = {}
    errors: dict[str, int] = {}
    ranks = view.ranks
    for number, node in enumerate(view.nodes):
        (errors if node["feature_type"] == _ERROR else features)[node["node_id"]] = number
    shared = features.keys() & errors.keys()
    sources, targets, seen = [], [], set()
    for link in links:
        source, target = link["source"], features[link["target"]]
        number = features[source] if source in features else errors[source]
        if source in shared:
            if (source, target) in seen and ranks[target] > ranks[errors[source]]:
                number = errors[source]
            seen.add((source, target))
        sources.append(number)
        targets.append(target)
    found = _Edges(
        sources=np.array(sources, dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
        weights=np.array([link["weight"] for link in links], dtype=np.float32),
    )
    return found.select(np.argsort(found.targets, kind="stable"))


def _strongest_nodes(view: _View, most: int) -> _View:
    """Tokens, logits, and the features and errors of the least cumulative influence."""
    always = np.array([node["feature_type"] in (_TOKEN, _LOGIT) for node in view.nodes])
    limit = view.reach["node"]
    reached = np.array([limit if node["influence"] is None else node["influence"] for node in view.nodes])
    optional = np.flatnonzero(~always)
    chosen = optional[np.argsort(reached[optional], kind="stable")[: max(0, most - int(always.sum()))]]
    keep = always.copy()
    keep[chosen] = True
    number = np.cumsum(keep) - 1
    left = view.edges.select(keep[view.edges.sources] & keep[view.edges.targets])
    return replace(
        view,
        nodes=[node for node, stays in zip(view.nodes, keep.tolist()) if stays],
        edges=_Edges(sources=number[left.sources], targets=number[left.targets], weights=left.weights),
        reach={**view.reach, "node": float(reached[chosen].max(initial=0.0))},
    )


def _strongest_edges(view: _View, most: int) -> _View:
    """The edges of the highest scores: the share of the target's input times its influence."""
    edges, nodes = view.edges, view.nodes
    magnitudes = np.abs(edges.weights).astype(np.float64)
    sums = np.bincount(edges.targets, weights=magnitudes, minlength=len(nodes))
    shares = magnitudes / np.maximum(sums, _LEAST)[edges.targets]
    flow = np.array(
        [node["token_prob"] if node["feature_type"] == _LOGIT else 0.0 for node in nodes], dtype=np.float64
    )
    heard = view.ranks[edges.targets]
    for rank in np.unique(heard)[::-1]:
        here = heard == rank
        arriving = flow[edges.targets[here]] * shares[here]
        flow += np.bincount(edges.sources[here], weights=arriving, minlength=len(nodes))
    scores = shares * flow[edges.targets]
    keep = np.zeros(len(scores), dtype=bool)
    keep[np.argpartition(-scores, most)[:most]] = True
    # A node comes in at its cumulative influence, an edge with the later of its ends.
    comes = np.array([0.0 if node["influence"] is None else node["influence"] for node in nodes])
    comes = np.maximum(comes[edges.sources], comes[edges.targets])
    held = []
    for threshold in np.linspace(0.05, 1.0, 20) * view.reach["node"]:
        there = comes <= threshold
        share = float(scores[keep & there].sum() / max(scores[there].sum(), _LEAST))
        held.append((float(threshold), share))
    return replace(view, edges=edges.select(keep), held=held)
