"""An attribution graph as the JSON that existing graph viewers read; the server writes the same.

An error node of layer l has the viewer id of feature l of layer 0 at its position, which is why nodes are known by
number everywhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshouse.client.attribution.graph import AttributionGraph, GraphNode

_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


def viewer_graph(graph: AttributionGraph) -> dict[str, Any]:
    """A graph, as it is pruned."""
    info = graph.info
    node_threshold, edge_threshold = graph.thresholds or (1.0, 1.0)
    best = max((logit.weight for logit in info.logits), default=0.0)
    ids = {node.number: node.id for node in graph.nodes}
    edges = graph.edges
    return {
        "metadata": {
            "slug": info.name.rpartition("/")[2],
            "scan": info.model,
            "transcoder_list": list(info.transcoders),
            "prompt_tokens": list(info.tokens),
            "prompt": "".join(info.tokens),
            "node_threshold": node_threshold,
            "schema_version": 1,
            "info": {"title": info.title, "held_fixed": info.held_fixed},
            "generation_settings": {},
            "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
        },
        "qParams": {
            "pinnedIds": list(graph.pinned),
            "supernodes": [[group.label, *group.node_ids] for group in graph.supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node(graph, node, best) for node in graph.nodes],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(
                edges.sources.tolist(), edges.targets.tolist(), edges.weights.tolist()
            )
            if source in ids and target in ids
        ],
    }


def _node(graph: AttributionGraph, node: GraphNode, best: float) -> dict[str, Any]:
    feature, text = -1, ""
    if node.kind == "feature":
        assert node.feature is not None
        feature = (node.layer + node.feature) * (node.layer + node.feature + 1) // 2 + node.feature
    elif node.kind == "error":
        text = f"Err: mlp {node.token!r}"
    elif node.kind == "token":
        feature, text = node.position, f"Emb: {node.token!r}"
    else:
        feature, text = int(node.id.split("_")[1]), f"Output {node.token!r} (p={node.weight:.3f})"
    return {
        "node_id": node.id,
        "feature": feature,
        "layer": "E" if node.kind == "token" else str(node.layer),
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": node.weight or 0.0,
        "is_target_logit": node.kind == "logit" and node.weight == best,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{node.id}-0",
        "clerp": text,
        "influence": node.influence,
        "activation": node.activation,
    }
