"""Pages without a browser: what they hold, that they reach for nothing, and what is refused."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest

from glasshouse.client import AttributionGraph, GraphInfo, GraphLogit, GraphScores
from glasshouse.client.attribution.graph import GraphFeatures
from glasshouse.client.attribution.pruning import Edges
from glasshouse.client.pictures import FeatureNote, graph_page
from glasshouse.client.pictures.graph_page import page_data

LOGIT, FEATURE, ERROR = "logit", "cross layer transcoder", "mlp reconstruction error"


def node(
    node_id: str, kind: str, layer: str, influence: float | None = None, probability: float = 0.0
) -> dict[str, Any]:
    return {
        "node_id": node_id, "feature_type": kind, "layer": layer, "ctx_idx": 1, "influence": influence,
        "token_prob": probability, "clerp": "", "activation": None, "feature": 0,
    }  # fmt: skip


def small() -> dict[str, Any]:
    """Error of layer 1 and feature 1 of layer 0, at position 1, share their id."""
    nodes = [
        node("0_1_1", FEATURE, "0", 0.9),
        node("2_5_1", FEATURE, "2", 0.5),
        node("0_1_1", ERROR, "1", 0.95),
        node("E_7_1", "embedding", "E"),
        node("4_9_1", LOGIT, "4", probability=0.5),
    ]
    links = [
        {"source": "E_7_1", "target": "0_1_1", "weight": 1.0},
        {"source": "0_1_1", "target": "2_5_1", "weight": 2.0},
        {"source": "0_1_1", "target": "2_5_1", "weight": 3.0},
        {"source": "2_5_1", "target": "4_9_1", "weight": -4.0},
        {"source": "0_1_1", "target": "4_9_1", "weight": 0.5},
    ]
    metadata = {
        "slug": "s",
        "scan": "tiny",
        "prompt": "a </script>",
        "prompt_tokens": ["<bos>", "a </script>"],
    }
    return {"metadata": metadata, "qParams": {"pinnedIds": ["2_5_1"]}, "nodes": nodes, "links": links}


def edges(data: dict[str, Any]) -> list[tuple[int, int, float]]:
    sources, targets = (
        np.frombuffer(base64.b64decode(data[name]), "<u2").tolist() for name in ("sources", "targets")
    )
    weights = np.frombuffer(base64.b64decode(data["weights"]), "<f4").tolist()
    return list(zip(sources, targets, weights))


def test_an_error_is_told_from_the_feature_of_its_id() -> None:
    found = edges(page_data(small()))
    assert found == [(3, 0, 1.0), (0, 1, 2.0), (2, 1, 3.0), (1, 4, -4.0), (0, 4, 0.5)]


def test_the_sliders_reach_to_what_was_pruned() -> None:
    graph = small()
    assert page_data(graph)["limits"] == {"node": 1.0, "edge": 1.0}
    assert page_data(graph)["thresholds"] == {"node": 0.8, "edge": 0.98}
    graph["metadata"]["pruning_settings"] = {"node_threshold": 0.7, "edge_threshold": 0.9}
    assert page_data(graph)["limits"] == page_data(graph)["thresholds"] == {"node": 0.7, "edge": 0.9}


def test_a_large_graph_keeps_its_strongest() -> None:
    data = page_data(small(), max_nodes=3)
    assert [each["node_id"] for each in data["nodes"]] == ["2_5_1", "E_7_1", "4_9_1"]
    assert data["limits"]["node"] == 0.5 and edges(data) == [(0, 2, -4.0)]
    # Scores by hand: the logit's inputs share 0.5 as 4 to 0.5; of the feature's 4/9, 3/5 come from the error.
    data = page_data(small(), max_edges=2)
    scores = {"logit": 4 / 9, "other": 0.5 / 9, "error": 4 / 9 * 0.6, "feature": 4 / 9 * 0.4}
    token = scores["feature"] + scores["other"]
    assert {(s, t) for s, t, _ in edges(data)} == {(2, 1), (1, 4)} and token < scores["error"]
    assert data["limits"] == {"node": 1.0, "edge": 1.0}
    # With the nodes up to 0.9 but not the error at 0.95, of three edges the logit's strongest is held.
    all_scores = sum(scores.values()) + token
    held = {round(threshold, 2): share for threshold, share in data["held"]}
    assert held[1.0] == pytest.approx((scores["logit"] + scores["error"]) / all_scores)
    assert held[0.9] == pytest.approx(scores["logit"] / (all_scores - scores["error"]))


def test_the_page_is_whole_and_reaches_for_nothing() -> None:
    note = FeatureNote(label="</script>", promoted=[("<!--", 1.0)])
    html = graph_page(small(), notes={(2, 5): note})
    assert not re.search(r"https?:|src=|href=|@import|url\(", html), "nothing from elsewhere"
    assert "default-src 'none'" in html and html.count("<script") == html.count("</script>") == 2
    assert "<!--" not in html and not re.search(r"/\*[A-Z]+\*/", html), "every part is put in"
    held = re.search(r'id="data">(.*?)</script>', html, re.S)
    assert held is not None
    data = json.loads(held[1])
    assert data["features"]["2/5"]["label"] == "</script>" and data["qParams"] == {"pinnedIds": ["2_5_1"]}
    named = set(re.findall(r'byId\("([a-z-]+)"\)', html))
    assert named <= set(re.findall(r'id="([a-z-]+)"', html)) | {"group-name"}, "made by the script"


def test_a_graph_of_the_clients_own_goes_by_number() -> None:
    """Feature 1 of layer 0 and the error of layer 1 at position 1 share their id, and only the error has an edge."""
    features = GraphFeatures(
        layers=np.array([0], np.int32), indices=np.array([1], np.int32), positions=np.array([1], np.int32),
        activations=np.array([2.0], np.float32),
    )  # fmt: skip
    info = GraphInfo(
        name="attributionGraphs/g", model="models/m", title="t", token_ids=[0, 7], tokens=["<bos>", " a"],
        transcoders=["t0"], n_layers=2, n_features=1, n_active_features=1, n_edges=2,
        logits=[GraphLogit(" b", 0.5, 9)], scores=GraphScores(0.25, 0.75),
    )  # fmt: skip
    error, token, logit = 1 + 2 + 1, 1 + 4 + 1, 1 + 4 + 2
    found = Edges(
        np.array([logit, 0], np.int32), np.array([error, token], np.int32), np.array([3.0, 1.0], np.float32)
    )
    graph = AttributionGraph(info, features, found)
    data = page_data(graph)
    assert edges(data) == [(token, 0, 1.0), (error, logit, 3.0)]
    assert data["nodes"][0]["node_id"] == data["nodes"][error]["node_id"] == "0_1_1"
    assert data["scores"] == {"replacement": 0.25, "completeness": 0.75} and data["limits"]["node"] == 1.0
    pruned = graph.prune(0.9, 0.9)
    data = page_data(pruned)
    assert (
        data["limits"] == {"node": 0.9, "edge": 0.9} and len(data["nodes"]) == pruned.n_nodes < graph.n_nodes
    )
    kept = [data["nodes"][number]["feature_type"] for number, _, _ in edges(data)]
    assert kept == [ERROR], "of the error alone the logit hears"


@pytest.mark.parametrize("missing", ["nodes", "links", "metadata"])
def test_what_is_no_graph_is_refused(missing: str) -> None:
    graph = {key: value for key, value in small().items() if key != missing}
    with pytest.raises(ValueError, match=missing):
        graph_page(graph)
