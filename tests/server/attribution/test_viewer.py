"""The viewer's JSON: its fields, its ids, and links that carry the graph's edges."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from glasshouse.server.attribution.attribution_graph import trace_graph
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.viewer import GraphCard, cantor, viewer_graph

from .conftest import load
from .test_graphs import transcoders_for


def test_cantor_pairs_are_distinct() -> None:
    assert cantor(0, 0) == 0 and cantor(1, 0) == 1 and cantor(0, 1) == 2
    assert len({cantor(layer, index) for layer in range(30) for index in range(30)}) == 900


def test_a_graph_in_the_viewers_schema(clean: Tensor) -> None:
    model = GradientModel(load("gpt2"))
    graph = trace_graph(model, transcoders_for(model, "per_layer"), clean, desired_probability=0.3)
    pruning = graph.prune(node_threshold=0.7, edge_threshold=0.9)
    card = GraphCard(
        slug="test",
        scan="tiny",
        prompt="a b",
        prompt_tokens=tuple(f"t{i}" for i in clean[0].tolist()),
        supernodes=(("group", "E_3_0"),),
    )
    found = json.loads(json.dumps(viewer_graph(graph, pruning, card, lambda token: f"<{token}>")))
    assert set(found) == {"metadata", "qParams", "nodes", "links"}
    assert found["metadata"]["schema_version"] == 1 and found["metadata"]["node_threshold"] == 0.8
    assert found["qParams"]["supernodes"] == [["group", "E_3_0"]] and found["qParams"]["linkType"] == "both"
    assert len(found["nodes"]) == int(pruning.nodes.sum())
    assert len(found["links"]) == int(pruning.edges.sum())
    kinds = {node["feature_type"] for node in found["nodes"]}
    assert kinds >= {"cross layer transcoder", "embedding", "logit"}
    last = clean.shape[1] - 1
    numbers = pruning.nodes.nonzero().squeeze(1).tolist()
    for number, node in zip(numbers, found["nodes"]):
        assert set(node) == {
            "node_id", "feature", "layer", "ctx_idx", "feature_type", "token_prob", "is_target_logit", "run_idx",
            "reverse_ctx_idx", "jsNodeId", "clerp", "influence", "activation",
        }  # fmt: skip
        if node["feature_type"] == "cross layer transcoder":
            f = graph.features
            layer, index, position = (int(x[number]) for x in (f.layers, f.indices, f.positions))
            assert node["node_id"] == f"{layer}_{index}_{position}" and node["layer"] == str(layer)
            assert node["feature"] == cantor(layer, index) and 0 < node["influence"] <= 1
        elif node["feature_type"] == "embedding":
            position = node["ctx_idx"]
            assert node["node_id"] == f"E_{int(clean[0, position])}_{position}" and node["layer"] == "E"
        elif node["feature_type"] == "logit":
            assert node["layer"] == str(model.n_layers + 1) and node["ctx_idx"] == last
            assert node["node_id"] == f"{model.n_layers + 1}_{node['feature']}_{last}"
            assert node["clerp"].startswith(f"Output '<{node['feature']}>'")
        else:
            assert node["feature"] == -1 and node["node_id"] == f"0_{node['layer']}_{node['ctx_idx']}"
    assert sum(node["is_target_logit"] for node in found["nodes"]) == 1
    weights = torch.tensor([link["weight"] for link in found["links"]])
    torch.testing.assert_close(weights, graph.edges.weights[pruning.edges])
    ids = {node["node_id"] for node in found["nodes"]}
    assert all(link["source"] in ids and link["target"] in ids for link in found["links"])
