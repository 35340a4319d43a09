"""An attribution graph as one interactive page: no network, no library, light or dark.

The page is `graph/page.html` with its style, its script and the graph put in. Nodes stay as the viewer's JSON has
them; edges, of which there may be hundreds of thousands, go in as packed arrays. What the page may hold is bounded:
of a larger graph the most influential nodes and the edges with the highest scores, as pruning ranks them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from glasshouse.client.arrays import Array

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


def graph_page(
    graph: Mapping[str, Any],
    *,
    notes: Mapping[tuple[int, int], FeatureNote] | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_nodes: int = MAX_NODES,
    max_edges: int = MAX_EDGES,
) -> str:
    """The page's HTML.

    `graph` is a graph in the viewer's JSON. `notes` tell of features by (layer, index). The sliders start at the
    thresholds, and reach to what the graph was pruned at. Raises ValueError where `graph` is not such a graph.
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
    graph: Mapping[str, Any],
    *,
    notes: Mapping[tuple[int, int], FeatureNote] | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_nodes: int = MAX_NODES,
    max_edges: int = MAX_EDGES,
) -> dict[str, Any]:
    """What the page's script draws; arguments as `graph_page` has them."""
    try:
        nodes, metadata = list(graph["nodes"]), dict(graph["metadata"])
        ranks = _ranks(nodes)
        edges = _numbered(nodes, ranks, graph["links"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an attribution graph: no {error}") from None
    applied = metadata.get("pruning_settings") or {}
    limits = {name: float(applied.get(f"{name}_threshold") or 1.0) for name in ("node", "edge")}
    if len(nodes) > max_nodes:
        nodes, ranks, edges, limits["node"] = _strongest_nodes(nodes, ranks, edges, max_nodes, limits["node"])
    if len(edges.weights) > max_edges:
        edges, share = _strongest_edges(nodes, ranks, edges, max_edges)
        limits["edge"] *= share
    number = np.dtype("<u4" if len(nodes) > 0xFFFF else "<u2")
    return {
        "metadata": metadata,
        "qParams": dict(graph.get("qParams") or {}),
        "nodes": nodes,
        "features": {f"{layer}/{index}": _told(note) for (layer, index), note in (notes or {}).items()},
        "limits": limits,
        "thresholds": {
            "node": min(node_threshold, limits["node"]),
            "edge": min(edge_threshold, limits["edge"]),
        },
        "sources": _packed(edges.sources, number),
        "targets": _packed(edges.targets, number),
        "weights": _packed(edges.weights, np.dtype("<f4")),
    }


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


def _ranks(nodes: Sequence[Mapping[str, Any]]) -> Array:
    """(n,) int64: tokens below every layer, logits above."""
    kinds = [node["feature_type"] for node in nodes]
    layers = [int(node["layer"]) if kind not in (_TOKEN, _LOGIT) else 0 for node, kind in zip(nodes, kinds)]
    top = max(layers, default=0) + 1
    return np.array(
        [-1 if kind == _TOKEN else top if kind == _LOGIT else layer for kind, layer in zip(kinds, layers)],
        dtype=np.int64,
    )


def _numbered(nodes: Sequence[Mapping[str, Any]], ranks: Array, links: Sequence[Mapping[str, Any]]) -> _Edges:
    """Links between ids as edges between node numbers.

    An error of layer l shares its id with feature l of layer 0 at its position. Errors have no inputs, so a target
    is the feature; so is a source of a target at or below the error's layer. Of two links between the same ids the
    feature's comes first, as nodes do.
    """
    features: dict[str, int] = {}
    errors: dict[str, int] = {}
    for number, node in enumerate(nodes):
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


def _strongest_nodes(
    nodes: list[Mapping[str, Any]], ranks: Array, edges: _Edges, most: int, limit: float
) -> tuple[list[Mapping[str, Any]], Array, _Edges, float]:
    """Tokens, logits, and the features and errors of the least cumulative influence; what they reach to."""
    always = np.array([node["feature_type"] in (_TOKEN, _LOGIT) for node in nodes])
    reached = np.array([limit if node["influence"] is None else node["influence"] for node in nodes])
    optional = np.flatnonzero(~always)
    chosen = optional[np.argsort(reached[optional], kind="stable")[: max(0, most - int(always.sum()))]]
    keep = always.copy()
    keep[chosen] = True
    number = np.cumsum(keep) - 1
    left = edges.select(keep[edges.sources] & keep[edges.targets])
    left = _Edges(sources=number[left.sources], targets=number[left.targets], weights=left.weights)
    kept = [node for node, stays in zip(nodes, keep.tolist()) if stays]
    return kept, ranks[keep], left, float(reached[chosen].max(initial=0.0))


def _strongest_edges(
    nodes: Sequence[Mapping[str, Any]], ranks: Array, edges: _Edges, most: int
) -> tuple[_Edges, float]:
    """The edges of the highest scores, share of the target's input times its influence; their share of the sum."""
    magnitudes = np.abs(edges.weights).astype(np.float64)
    sums = np.bincount(edges.targets, weights=magnitudes, minlength=len(nodes))
    shares = magnitudes / np.maximum(sums, _LEAST)[edges.targets]
    flow = np.array(
        [node["token_prob"] if node["feature_type"] == _LOGIT else 0.0 for node in nodes], dtype=np.float64
    )
    heard = ranks[edges.targets]
    for rank in np.unique(heard)[::-1]:
        here = heard == rank
        arriving = flow[edges.targets[here]] * shares[here]
        flow += np.bincount(edges.sources[here], weights=arriving, minlength=len(nodes))
    scores = shares * flow[edges.targets]
    keep = np.zeros(len(scores), dtype=bool)
    keep[np.argpartition(-scores, most)[:most]] = True
    return edges.select(keep), float(scores[keep].sum() / max(scores.sum(), _LEAST))
