"""Attribution in the client, against a fake server: results, graphs, refusals, and both clients alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasshouse.client import (
    AsyncClient,
    AttributionGraph,
    Client,
    GlasshouseError,
    InvalidArgumentError,
    Model,
    NotFoundError,
    PatchResult,
    feature_setting,
    feature_value,
    kl_divergence,
    likeliest,
    log_probability,
    logit_difference,
    patch_grid,
    patch_node,
    probability,
    probe_value,
)
from glasshouse.client.attribution import builders
from glasshouse.client.attribution.pruning import Edges, graph_scores, prune
from glasshouse.client.testing import Failure, FakeServer

CLEAN, CORRUPT = "abcd", "abxd"
METRIC = logit_difference("a", "b")
SENDER, RECEIVER = patch_node("blocks.0.attn.hook_z", head=1), patch_node("blocks.1.hook_resid_post")


def test_a_metric_on_the_wire() -> None:
    built = builders.metric(logit_difference([" she", 7, likeliest(3)], " he", position=2))
    assert list(built.logit_difference.targets.texts) == [" she"]
    assert list(built.logit_difference.targets.token_ids) == [7]
    assert built.logit_difference.targets.top_k == 3
    assert built.position == 2
    assert not builders.metric(probability("x")).HasField("position")
    assert builders.metric(kl_divergence([1, 2])).kl_divergence.reference.token_ids == [1, 2]
    assert not builders.metric(kl_divergence()).kl_divergence.HasField("reference")
    assert builders.metric(feature_value("sae", 3, pre_activation=True)).feature.pre_activation
    assert builders.metric(probe_value("mood", "sad")).probe.label == "sad"


def test_a_baseline_on_the_wire() -> None:
    def built(baseline: Any) -> Any:
        return builders.attribute_tokens(
            "", CLEAN, METRIC, hook_point="", method="integrated_gradients", steps=1, baseline=baseline, freeze_=(),
            by_element=False,
        )  # fmt: skip

    assert built(None).WhichOneof("baseline") is None
    assert built("mean_embedding").mean_embedding and built("zeros").zeros
    assert built("a b").baseline_input.text == "a b"
    assert built([1, 2]).WhichOneof("baseline") == "baseline_input"
    assert built(np.zeros(8)).WhichOneof("baseline") == "baseline_activations"


@pytest.mark.parametrize("tokens", [1.5, [None], True, [[" a"]]])
def test_what_is_no_token(tokens: Any) -> None:
    with pytest.raises(TypeError):
        log_probability(tokens)


def test_tokens_sum_to_the_change(model: Model) -> None:
    heard: list[Any] = []
    found = model.attribute_tokens(CLEAN, METRIC, by_element=True, progress=heard.append)
    assert found.scores.sum() == pytest.approx(found.value - found.baseline_value)
    assert found.input.strings == ["<bos>", "a", "b", "c", "d"]
    assert found.attributions is not None and found.attributions.shape == (5, 8)
    assert heard[-1].done == heard[-1].total == 64
    other = model.attribute_tokens(CLEAN, METRIC, baseline=[1, 9, 9, 9, 9])
    assert other.baseline_value != 0 == found.baseline_value
    assert other.scores.sum() == pytest.approx(other.value - other.baseline_value)
    with pytest.raises(InvalidArgumentError, match="baseline_input"):
        model.attribute_tokens(CLEAN, METRIC, baseline=[1, 2])
    place, token, score = found.top(1)[0]
    assert token == found.input.strings[place] and abs(score) == np.abs(found.scores).max()


def test_parts_sum_to_the_logit(model: Model) -> None:
    found = model.direct_attribution(CLEAN, "a", "b", dictionaries="resid-post-0")
    assert sum(found.contributions.values()) + found.constant == pytest.approx(found.logit)
    assert found.top_heads(1)[0][2] == pytest.approx(np.abs(found.heads).max(), abs=10)
    assert found.features[0].dictionary == "resid-post-0"


def test_a_sweep_as_it_comes_and_whole(model: Model) -> None:
    grids = ["hook_resid_pre", patch_grid("attn.hook_z", by_head=True, all_positions_at_once=True)]
    with model.patch_sweep(CLEAN, CORRUPT, metric=METRIC, grids=grids) as sweep:
        results = list(sweep)
        whole = sweep.result()
    assert [grid.values.shape for grid in whole.grids] == [(2, 1, 5), (2, 2, 1)]
    flat = np.concatenate([grid.values.ravel() for grid in whole.grids])
    assert [result.value for result in results] == pytest.approx(flat)
    first, last = results[0], results[-1]
    assert (first.component, first.layer, first.column, first.position) == ("hook_resid_pre", 0, None, 0)
    assert (last.component, last.layer, last.column, last.position, last.grid) == (
        "attn.hook_z",
        1,
        1,
        None,
        1,
    )
    assert whole.grids[1].row_labels == ["L0.H0", "L0.H1", "L1.H0", "L1.H1"]
    assert whole.grids[1].column_labels == ["all"] and whole.grids[0].column_labels[1] == "a"
    best = whole.grids[0].top(1)[0]
    assert isinstance(best, PatchResult) and abs(best.effect) == np.abs(whole.grids[0].effects).max()
    with pytest.raises(ValueError, match="too many values"):
        _ = whole.grid


def test_a_broken_sweep_is_no_result(server: FakeServer, model: Model) -> None:
    server.fail("PatchSweep", Failure("UNAVAILABLE", "gone"), after_events=2)
    with pytest.raises(GlasshouseError):
        model.patch_sweep(CLEAN, CORRUPT, metric=METRIC).result()


def test_a_graph_prunes_by_hand() -> None:
    """Two features a chain, one weak and one strong; a third that leads nowhere; an error that nearly nobody hears."""
    # 0, 1, 2: features; 3: error; 4: token; 5: logit
    edges = Edges(
        np.array([5, 5, 0, 1, 2, 5], np.int32),
        np.array([0, 1, 4, 4, 4, 3], np.int32),
        np.array([8.0, 1.0, 2.0, 1.0, 3.0, 1.0], np.float32),
    )
    weights = np.array([0, 0, 0, 0, 0, 1], np.float32)
    is_feature = np.array([1, 1, 1, 0, 0, 0], np.bool_)
    is_error = np.array([0, 0, 0, 1, 0, 0], np.bool_)
    influence = edges.influence(weights)
    assert influence == pytest.approx([0.8, 0.1, 0.0, 0.1, 0.9, 0.0])
    found = prune(
        edges, weights, is_feature=is_feature, is_error=is_error, node_threshold=0.8, edge_threshold=1.0
    )
    assert found.nodes.tolist() == [True, False, False, False, True, True]
    assert found.edges.tolist() == [True, False, True, False, False, False]
    scores = graph_scores(edges, weights, is_token=np.arange(6) == 4, is_error=is_error)
    assert scores.replacement == pytest.approx(0.9)


def test_a_graph_is_fetched_marked_and_kept(client: Client, model: Model, tmp_path: Path) -> None:
    heard: list[Any] = []
    graph = model.attribution_graph(CLEAN, title="mine").result(20, heard.append)
    assert graph.info.title == "mine" and heard[-1].fraction == 1.0
    assert len(graph.features) == 10 and len(graph.edges) == 11
    chain = graph.incoming(graph.n_nodes_total - 1)
    assert chain[0][0].kind == "feature" and chain[0][0].layer == 1
    assert graph.outgoing(chain[0][0])[0][0].kind == "logit"
    assert [node.kind for node in graph.nodes].count("error") == 10
    pruned = graph.prune()
    assert [node.position for node in pruned.top_features()] == [4, 4], "one chain leads to the logit"
    assert pruned.scores.replacement == 1.0
    group = pruned.add_supernode("chain", pruned.top_features())
    assert client.annotate_attribution_graph(pruned).supernodes == [group]
    pruned.save(tmp_path / "graph.npz")
    loaded = AttributionGraph.load(tmp_path / "graph.npz")
    assert loaded.info == pruned.annotated() and loaded.thresholds == (0.8, 0.98)
    assert np.array_equal(loaded.kept, pruned.kept)
    pruned.save(tmp_path / "graph.json")
    viewer = json.loads((tmp_path / "graph.json").read_text())
    assert viewer["metadata"]["schema_version"] == 1
    assert {node["feature_type"] for node in viewer["nodes"]} == {
        "cross layer transcoder",
        "embedding",
        "logit",
    }
    assert {link["source"] for link in viewer["links"]} <= {node["node_id"] for node in viewer["nodes"]}
    with pytest.raises(ValueError, match="node_threshold is 0"):
        graph.prune(0)
    client.delete_attribution_graph(graph.name)
    with pytest.raises(NotFoundError):
        client.read_attribution_graph(graph.name)


def test_what_is_no_saved_graph(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"no zip")
    np.savez(tmp_path / "y.npz", facts=np.zeros(3))
    for name in ("x.npz", "y.npz"):
        with pytest.raises(ValueError):
            AttributionGraph.load(tmp_path / name)


def test_networkx_is_optional(model: Model) -> None:
    networkx = pytest.importorskip("networkx")
    graph = model.attribution_graph(CLEAN).result(20).prune().to_networkx()
    assert isinstance(graph, networkx.DiGraph) and networkx.is_directed_acyclic_graph(graph)


def test_a_circuit_names_its_components(client: Client, model: Model) -> None:
    found = model.discover_circuit(CLEAN, CORRUPT, threshold=0.1).result(20)
    assert found.edges == [("a0.h0", "logits"), ("embed", "a0.h0.q")]
    assert found.nodes == ["embed", "a0.h0", "logits"]
    assert client.circuits()[0].edges == [] and client.circuit(found.name) == found
    with pytest.raises(TypeError):
        model.discover_circuit(CLEAN, CORRUPT, threshold=0.1, target_edges=3)


def test_refusals_name_the_field(model: Model) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        model.attribute_tokens(CLEAN, logit_difference("long"))
    assert caught.value.field == "metric.logit_difference.targets.texts[0]"
    with pytest.raises(InvalidArgumentError) as refused:
        model.patch_sweep(CLEAN, "a", metric=METRIC).result()
    assert refused.value.field == "corrupt"
    with pytest.raises(InvalidArgumentError) as unknown:
        model.attribute_tokens(CLEAN, METRIC, freeze=["everything"])  # type: ignore[list-item]
    assert unknown.value.field == "freeze"


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "attribute_tokens": lambda c, m: m.attribute_tokens(CLEAN, METRIC),
    "direct_attribution": lambda c, m: m.direct_attribution(CLEAN, "a"),
    "mediate_effect": lambda c, m: m.mediate_effect(CLEAN, CORRUPT, metric=METRIC),
    "path_patch": lambda c, m: m.path_patch(
        CLEAN, CORRUPT, metric=METRIC, senders=[SENDER], receivers=[RECEIVER]
    ),
    "atp": lambda c, m: m.attribution_patch(CLEAN, CORRUPT, metric=METRIC),
    "eap": lambda c, m: m.attribution_patch(CLEAN, CORRUPT, metric=METRIC, method="eap-ig"),
    "attribute_features": lambda c, m: m.attribute_features(CLEAN, METRIC, dictionaries="resid-post-1"),
    "connections": lambda c, m: m.feature_connections(1, 3),
    "intervene": lambda c, m: m.intervene_on_features(CLEAN, [feature_setting(0, 1, 2, 3.0)], max_tokens=4),
    "estimate": lambda c, m: m.estimate_attribution_graph(CLEAN),
    "estimate_circuit": lambda c, m: m.estimate_circuit(CLEAN, CORRUPT, threshold=1.0),
    "graphs": lambda c, m: c.attribution_graphs(),
    "circuits": lambda c, m: c.circuits(),
    "no such graph": lambda c, m: c.read_attribution_graph("attributionGraphs/9"),
    "no such circuit": lambda c, m: c.circuit("circuits/9"),
    "bad metric": lambda c, m: m.attribute_tokens(CLEAN, log_probability(())),
}


def outcome(value: Any) -> str:
    with np.printoptions(threshold=10_000):
        return repr(value) + repr(getattr(value, "scores", None)) + repr(getattr(value, "heads", None))


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
async def test_both_clients_alike(server: FakeServer, call: Callable[[Any, Any], Any]) -> None:
    with Client(server.target) as client:
        try:
            one = outcome(call(client, client.model()))
        except GlasshouseError as error:
            one = f"{type(error).__name__} {error.field} {error.reason}"
    async with AsyncClient(server.target) as client:
        try:
            other = outcome(await call(client, await client.model()))
        except GlasshouseError as error:
            other = f"{type(error).__name__} {error.field} {error.reason}"
    assert one == other


async def test_a_sweep_and_a_graph_awaited(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        model = await client.model()
        async with model.patch_sweep(CLEAN, CORRUPT, metric=METRIC) as sweep:
            results = [result async for result in sweep]
            whole = await sweep.result()
        assert len(results) == whole.grid.values.size == 10
        graph = await (await model.attribution_graph(CLEAN)).result(20)
        assert (await client.read_attribution_graph(graph.name)).info == graph.info
        circuit = await (await model.discover_circuit(CLEAN, CORRUPT, threshold=0.1)).result(20)
        await client.delete_circuit(circuit.name)
        await client.delete_attribution_graph(graph.name)
        assert await client.circuits() == [] and await client.attribution_graphs() == []
