"""Attribution through the real server and the real client, against the same functions called here on the same weights,
and against plain passes of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse import fable
from glasshouse.client import (
    AsyncClient,
    AttributionGraph,
    Client,
    InvalidArgumentError,
    Model,
    NotFoundError,
    ProbeWeights,
    direction_value,
    feature_grid,
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
from glasshouse.server.attribution import attribution_graph, circuits, direct, sweeps, tokens
from glasshouse.server.attribution.attribution_patching import attribution_patch
from glasshouse.server.attribution.edge_attribution import attribute_edges
from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.nodes import node_grid
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.dictionaries.open import open_dictionaries
from glasshouse.server.models.loading import load_model

CLEAN = "Once upon a time there was a girl named Lily. Lily was happy because"
CORRUPT = "Once upon a time there was a boy named Tom. Tom was happy because"
GENDER = logit_difference(" she", " he")
SAE = "resid-post-3"


@pytest.fixture(scope="module")
def twin() -> GradientModel:
    """The model here, in this process."""
    torch.set_num_threads(1)
    return GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))


@pytest.fixture(scope="module")
def ids(twin: GradientModel) -> dict[str, Any]:
    codec = twin.loaded.tokenizer
    return {
        "clean": torch.tensor(codec.encode(CLEAN)),
        "corrupt": torch.tensor(codec.encode(CORRUPT)),
        "she": codec.encode(" she", False)[0],
        "he": codec.encode(" he", False)[0],
    }


@pytest.fixture(scope="module")
def gender(ids: dict[str, Any]) -> LogitDifference:
    return LogitDifference(targets=(ids["she"],), foils=(ids["he"],))


@pytest.fixture(scope="module")
def graph(server: Any) -> Iterator[AttributionGraph]:
    """One graph of the clean input, whole."""
    with Client(server.target) as client:
        yield client.model().attribution_graph(CLEAN).result(timeout=120)


def value_of(twin: GradientModel, metric: LogitDifference, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(metric(twin.forward(twin.tokens(ids)))[0])


def test_tokens(model: Model, twin: GradientModel, ids: dict[str, Any], gender: LogitDifference) -> None:
    heard: list[Any] = []
    found = model.attribute_tokens(CLEAN, GENDER, by_element=True, progress=heard.append)
    mean = twin.loaded.model.get_input_embeddings().weight.detach().mean(0)
    ours = tokens.attribute_tokens(twin, ids["clean"], gender, baseline=mean)
    assert found.input.ids == ids["clean"].tolist()
    assert found.scores == pytest.approx(ours.scores.numpy(), abs=1e-3)
    assert found.attributions is not None
    assert found.attributions.sum(-1) == pytest.approx(found.scores, abs=1e-4)
    assert found.value == pytest.approx(value_of(twin, gender, ids["clean"]), abs=1e-4)
    assert abs(found.residual) < 1e-3
    assert found.scores.sum() == pytest.approx(found.value - found.baseline_value - found.residual, abs=1e-6)
    assert heard and all(0 < step.done <= step.total for step in heard)
    assert "Nothing was held fixed" in found.held_fixed.statement
    assert not found.held_fixed.attention_patterns


def test_tokens_with_other_baselines(model: Model, twin: GradientModel, ids: dict[str, Any]) -> None:
    mean = model.attribute_tokens(CLEAN, GENDER, baseline="mean_embedding")
    assert mean.scores.tolist() == model.attribute_tokens(CLEAN, GENDER).scores.tolist(), "the default"
    embedding = twin.loaded.model.get_input_embeddings().weight.detach().mean(0).numpy()
    given = model.attribute_tokens(CLEAN, GENDER, baseline=embedding, steps=64)
    assert mean.scores == pytest.approx(given.scores, abs=1e-3)
    zeros = model.attribute_tokens(CLEAN, GENDER, baseline="zeros", steps=1)
    nothing = twin.forward(twin.tokens(ids["clean"]), edits={"hook_embed": [setting(torch.zeros(1))]})
    logits = nothing.logits()[0]
    assert zeros.baseline_value == pytest.approx(float(logits[ids["she"]] - logits[ids["he"]]), abs=1e-4)
    other = model.attribute_tokens(CLEAN, GENDER, baseline=CORRUPT, steps=64)
    same = [p for p, (a, b) in enumerate(zip(ids["clean"].tolist(), ids["corrupt"].tolist())) if a == b]
    assert other.scores[same] == pytest.approx(np.zeros(len(same)), abs=1e-6), "nothing moved there"
    assert other.baseline_value == pytest.approx(
        model.attribute_tokens(CORRUPT, GENDER, steps=1).value, abs=1e-4
    )
    said = [found.held_fixed.statement for found in (mean, zeros, given, other)]
    assert (
        "average tokens" in said[0] and "zeros" in said[1] and "given" in said[2] and "other input" in said[3]
    )


def test_the_average_input_is_one_baseline_at_every_hook_point(model: Model) -> None:
    at_embeddings = model.attribute_tokens(CLEAN, GENDER)
    for hook_point in ("blocks.2.hook_resid_pre", "blocks.5.hook_resid_post"):
        found = model.attribute_tokens(CLEAN, GENDER, hook_point=hook_point)
        assert found.baseline_value == pytest.approx(at_embeddings.baseline_value, abs=1e-3)
        assert abs(found.residual) < 1e-3


def test_gradient_x_input_has_no_baseline(model: Model) -> None:
    plain = model.attribute_tokens(CLEAN, GENDER, method="gradient_x_input")
    zeros = model.attribute_tokens(CLEAN, GENDER, method="gradient_x_input", baseline="zeros")
    mean = model.attribute_tokens(CLEAN, GENDER, method="gradient_x_input", baseline="mean_embedding")
    assert plain.scores.tolist() == zeros.scores.tolist()
    assert plain.scores != pytest.approx(mean.scores, abs=1e-2)


def test_held_patterns_and_norms_make_it_linear_in_attention(model: Model) -> None:
    frozen = model.attribute_tokens(
        CLEAN, GENDER, method="gradient_x_input", freeze=["attention_patterns", "norm_scales"]
    )
    assert frozen.held_fixed.attention_patterns and frozen.held_fixed.norm_scales
    assert "attention patterns and the scales of all norms" in str(frozen.held_fixed)
    free = model.attribute_tokens(CLEAN, GENDER, method="gradient_x_input")
    assert not np.allclose(frozen.scores, free.scores)


def test_direct_attribution_sums_to_the_logit(model: Model, twin: GradientModel, ids: dict[str, Any]) -> None:
    found = model.direct_attribution(CLEAN, " she", " he", dictionaries=[SAE, "transcoder-4"])
    ours = direct.attribute_directly(twin, ids["clean"], {ids["she"]: 1.0, ids["he"]: -1.0})
    assert found.logit == pytest.approx(ours.logit, abs=1e-4)
    assert found.logit == pytest.approx(found.constant + sum(found.contributions.values()), abs=1e-4)
    assert abs(found.remainder) < 1e-4
    assert found.heads == pytest.approx(ours.heads.numpy(), abs=1e-4)
    for layer in range(twin.n_layers):
        written = found.contributions[f"blocks.{layer}.hook_mlp_out"]
        assert found.neurons[layer].sum() + found.neuron_bias[layer] == pytest.approx(written, abs=1e-4)
    for part in found.features:
        assert part.parts.sum() + part.rest + part.bias + part.error == pytest.approx(part.total, abs=1e-4)
    transcoder = next(part for part in found.features if part.dictionary == "transcoder-4")
    assert transcoder.total == pytest.approx(found.contributions["blocks.4.hook_mlp_out"], abs=1e-4)


def test_a_sweep_streams_what_single_patches_give(
    model: Model, twin: GradientModel, ids: dict[str, Any], gender: LogitDifference
) -> None:
    grids = ["hook_resid_pre", patch_grid("attn.hook_z", heads=[1, 4], all_positions_at_once=True)]
    with model.patch_sweep(CLEAN, CORRUPT, metric=GENDER, grids=grids) as sweep:
        results = list(sweep)
        whole = sweep.result()
    n_positions = len(ids["clean"])
    assert len(results) == twin.n_layers * (n_positions + 2)
    assert whole.grids[0].values.shape == (twin.n_layers, 1, n_positions)
    assert whole.grids[1].row_labels[:2] == ["L0.H1", "L0.H4"]
    nodes = node_grid(twin, "hook_resid_pre", n_positions=n_positions)
    ours = [
        result.effect
        for batch in sweeps.patch_sweep(twin, ids["clean"], nodes, gender, others=ids["corrupt"])
        for result in batch
    ]
    assert whole.grids[0].effects.ravel() == pytest.approx(np.array(ours), abs=1e-4)
    for result in results[: n_positions * 2]:
        assert result.position is not None
        at = whole.grids[0].values[result.layer, 0, result.position]
        assert result.value == pytest.approx(at, abs=1e-9)
    # The whole stream of the first layer, patched at every position in turn, is the corrupt input at those tokens.
    together = model.patch_sweep(
        CLEAN,
        CORRUPT,
        metric=GENDER,
        grids=patch_grid("hook_resid_pre", layers=[0], all_positions_at_once=True),
    ).result()
    assert together.grid.values.item() == pytest.approx(whole.corrupt_value, abs=1e-4)
    back = model.patch_sweep(
        CLEAN,
        CORRUPT,
        metric=GENDER,
        grids=patch_grid("hook_resid_pre", layers=[0], all_positions_at_once=True),
        direction="denoise",
    ).result()
    assert back.base_value == pytest.approx(whole.corrupt_value, abs=1e-6)
    assert back.grid.values.item() == pytest.approx(whole.clean_value, abs=1e-4)


def test_sweeps_without_a_corrupt_input(model: Model) -> None:
    grid = patch_grid("hook_mlp_out", layers=[5], positions=[3, 15])
    zero = model.patch_sweep(CLEAN, metric=GENDER, grids=grid, replacement="zero").result()
    mean = model.patch_sweep(CLEAN, metric=GENDER, grids=grid, replacement="mean", others=[CORRUPT]).result()
    assert zero.grid.effects.shape == mean.grid.effects.shape == (1, 1, 2)
    assert zero.grid.effects[0, 0, 0] == pytest.approx(0, abs=1e-5), "no later layer looks back at position 3"
    assert abs(zero.grid.effects[0, 0, 1]) > 0.1
    drawn = [
        model.patch_sweep(
            CLEAN, metric=GENDER, grids=grid, replacement="resample", others=[CORRUPT, CLEAN], seed=seed
        ).result()
        for seed in (1, 1, 2, 3, 4)
    ]
    assert np.array_equal(drawn[0].grid.values, drawn[1].grid.values)
    assert len({result.grid.values[0, 0, 1] for result in drawn}) > 1


def test_features_and_their_error_as_nodes_sum_to_the_stream(model: Model) -> None:
    """Each node alone; a metric linear in the stream makes them add up."""
    vector = np.zeros(192, np.float32)
    vector[7] = 1.0
    value = direction_value("blocks.3.hook_resid_post", vector)
    features = model.patch_sweep(
        CLEAN, CORRUPT, metric=value, grids=feature_grid(SAE, positions=[15])
    ).result()
    whole = model.patch_sweep(
        CLEAN,
        CORRUPT,
        metric=value,
        grids=patch_grid("hook_resid_post", layers=[3], positions=[15]),
    ).result()
    assert features.grid.axes.columns[-1] == -1
    assert features.grid.effects.sum() == pytest.approx(whole.grid.effects.item(), abs=1e-3)


def test_mediation_adds_up_for_the_whole_stream(model: Model) -> None:
    found = model.mediate_effect(
        CLEAN,
        CORRUPT,
        metric=GENDER,
        grids=[patch_grid("hook_resid_pre", layers=[0], all_positions_at_once=True), "attn.hook_z"],
    )
    assert found.grids[0].indirect.item() == pytest.approx(found.total, abs=1e-4)
    assert found.grids[0].direct.item() == pytest.approx(0, abs=1e-4)
    assert found.grids[1].direct.shape == found.grids[1].indirect.shape == (6, 1, 16)


def test_path_patching_to_everything_after_the_last_head_is_its_patch(model: Model) -> None:
    sender = patch_node("blocks.5.attn.hook_z", head=1)
    last = patch_node("blocks.5.hook_resid_post")
    direct_effect = model.path_patch(CLEAN, CORRUPT, metric=GENDER, senders=[sender], receivers=[last])
    swept = model.patch_sweep(
        CLEAN,
        CORRUPT,
        metric=GENDER,
        grids=patch_grid("attn.hook_z", layers=[5], heads=[1], all_positions_at_once=True),
    ).result()
    assert direct_effect[0] == pytest.approx(swept.grid.effects.item(), abs=1e-4)
    held = model.path_patch(CLEAN, CORRUPT, metric=GENDER, senders=[sender], receivers=[last], hold_mlps=True)
    assert held.shape == (1,)


@pytest.mark.parametrize("method", ["atp", "atp*"])
def test_attribution_patching(
    model: Model, twin: GradientModel, ids: dict[str, Any], gender: LogitDifference, method: Any
) -> None:
    found = model.attribution_patch(CLEAN, CORRUPT, metric=GENDER, method=method, verify_top=12)
    star = method == "atp*"
    ours = attribution_patch(twin, ids["clean"], ids["corrupt"], gender, qk_fix=star, grad_drop=star)
    assert found.method == method and found.magnitudes == star
    for component, scores in ours.scores.items():
        assert found.scores[component] == pytest.approx(scores.numpy(), abs=1e-3)
    assert found.verification is not None and len(found.verification.nodes) == 12
    node = found.verification.nodes[0]
    layer, component = int(node.hook_point.split(".")[1]), node.hook_point.split(".", 2)[2]
    again = model.patch_sweep(
        CLEAN,
        CORRUPT,
        metric=GENDER,
        grids=patch_grid(
            component,
            layers=[layer],
            heads=[] if node.head is None else [node.head],
            positions=[node.position],
        ),
    ).result()
    assert found.verification.exact[0] == pytest.approx(again.grid.effects.item(), abs=1e-3)
    assert -1 <= found.verification.rank_correlation <= 1


@pytest.mark.parametrize(("method", "steps"), [("eap", 0), ("eap-ig", 5)])
def test_edge_attribution(
    model: Model,
    twin: GradientModel,
    ids: dict[str, Any],
    gender: LogitDifference,
    method: Any,
    steps: int,
) -> None:
    found = model.attribution_patch(CLEAN, CORRUPT, metric=GENDER, method=method, verify_top=5)
    ours = attribute_edges(twin, ids["clean"], ids["corrupt"], gender, steps=steps)
    assert found.edge_scores is not None and found.verification is not None
    assert np.array_equal(np.isnan(found.edge_scores), ~ours.valid.numpy())
    assert np.nan_to_num(found.edge_scores) == pytest.approx(ours.scores.numpy(), abs=1e-3)
    source, destination, score = ours.top(1)[0]
    assert found.top(1)[0][0] == f"{source}->{destination}"
    assert found.verification.edges[0] == (str(source), str(destination))
    assert found.verification.approximate[0] == pytest.approx(score, abs=1e-3)


def test_feature_attribution_is_complete(model: Model) -> None:
    found = model.attribute_features(CLEAN, GENDER, dictionaries=[SAE, "transcoder-2"], steps=64)
    for part in found.dictionaries:
        whole = part.attributions.sum() + part.errors.sum()
        assert whole + part.residual == pytest.approx(part.value - part.baseline_value, abs=1e-3)
        assert abs(part.residual) < 0.05
        assert part.top(1)[0][2] == pytest.approx(
            np.abs(part.attributions).max() * np.sign(part.top(1)[0][2])
        )
    plain = model.attribute_features(CLEAN, GENDER, dictionaries=SAE, method="gradient_x_input")
    assert not np.allclose(plain.dictionaries[0].attributions, found.dictionaries[0].attributions)


def test_metrics_mean_what_they_say(model: Model, ids: dict[str, Any]) -> None:
    score = model.score([*ids["clean"].tolist(), ids["she"]])
    logprob = float(score.logprobs[-1])

    def value(metric: Any) -> float:
        return model.attribute_tokens(CLEAN, metric, method="gradient_x_input").value

    assert value(log_probability(" she")) == pytest.approx(logprob, abs=1e-4)
    assert value(probability([" she"])) == pytest.approx(np.exp(logprob), abs=1e-4)
    assert value(log_probability(int(ids["she"]), position=15)) == pytest.approx(logprob, abs=1e-4)
    assert value(probability(likeliest(4096 // 64))) == pytest.approx(1.0, abs=0.05)
    assert value(kl_divergence(CORRUPT)) > 0.1
    at = "blocks.2.hook_resid_post"
    vector = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    read = model.activations(CLEAN, hook_points=at)[at]
    assert value(direction_value(at, vector, 0.5, position=7)) == pytest.approx(
        float(read[7].astype(np.float32) @ vector) + 0.5, abs=1e-3
    )
    feature, activation = model.dictionary(SAE).encode(CLEAN).top(k=1).rows[12].features[0]
    assert value(feature_value(SAE, feature, position=12)) == pytest.approx(activation, abs=1e-2)


def test_a_probe_is_a_metric(model: Model) -> None:
    at = "blocks.4.hook_resid_post"
    drawn = np.random.default_rng(1).standard_normal((192, 1)).astype(np.float32)
    weights = ProbeWeights(layers=[(drawn, np.array([0.25], np.float32))])
    probe = model.create_probe("drawn", weights, labels=["no", "yes"], hook_points=at)
    found = model.attribute_tokens(CLEAN, probe_value(probe))
    read = model.activations(CLEAN, hook_points=at)[at][-1].astype(np.float32)
    assert found.value == pytest.approx(float((read @ drawn).item()) + 0.25, abs=1e-2)
    assert abs(found.residual) < 0.05
    with pytest.raises(NotFoundError) as caught:
        model.attribute_tokens(CLEAN, probe_value("nope"))
    assert caught.value.field == "metric.probe.probe"
    with pytest.raises(InvalidArgumentError) as refused:
        model.attribute_tokens(CLEAN, probe_value("drawn", "maybe"))
    assert refused.value.field == "metric.probe.label"


def test_a_graph_is_the_one_traced_here(
    graph: AttributionGraph, twin: GradientModel, ids: dict[str, Any]
) -> None:
    dictionaries = [
        dictionary
        for layer in range(twin.n_layers)
        for dictionary in open_dictionaries("t", str(fable.dictionary_path(f"transcoder-{layer}")))
    ]
    ours = attribution_graph.trace_graph(twin, Transcoders(twin, dictionaries), ids["clean"])
    assert graph.n_nodes == ours.edges.n_nodes
    assert graph.features.indices.tolist() == ours.features.indices.tolist()
    dense = np.zeros((graph.n_nodes, graph.n_nodes), np.float32)
    dense[graph.edges.targets, graph.edges.sources] = graph.edges.weights
    assert dense == pytest.approx(ours.adjacency().numpy(), abs=1e-4)
    scores = ours.scores()
    assert graph.scores.replacement == pytest.approx(scores.replacement, abs=1e-4)
    assert graph.info.scores.completeness == pytest.approx(scores.completeness, abs=1e-4)
    assert graph.tokens[0] and graph.info.n_active_features == ours.n_active
    assert [logit.token_id for logit in graph.logits] == [logit.token_id for logit in ours.logits]


@pytest.mark.parametrize(
    "thresholds",
    [(0.5, 0.9), (0.8, 0.98), (0.95, 1.0), (1.0, 0.95)],
    ids=lambda pair: "-".join(map(str, pair)),
)
def test_pruning_here_is_pruning_there(
    client: Client, graph: AttributionGraph, thresholds: tuple[float, float]
) -> None:
    here = graph.prune(*thresholds)
    there = client.read_attribution_graph(
        graph.name, node_threshold=thresholds[0], edge_threshold=thresholds[1]
    )
    assert np.array_equal(here.kept, there.kept)
    assert np.array_equal(here.edges.targets, there.edges.targets)
    assert np.array_equal(here.edges.weights, there.edges.weights)
    assert here.scores.replacement == pytest.approx(there.scores.replacement, abs=1e-5)
    assert here.cumulative_influence == pytest.approx(there.cumulative_influence, abs=1e-4)


def test_a_graph_is_kept_with_its_marks_and_deleted(client: Client, model: Model, tmp_path: Path) -> None:
    traced = model.attribution_graph(CLEAN, targets=[" she", " he"], max_feature_nodes=64, title="pronouns")
    graph = traced.result(timeout=120)
    assert graph.info.title == "pronouns" and len(graph.features) == 64
    assert [logit.label for logit in graph.logits] == [" she", " he"]
    graph.add_supernode("first", graph.top_features(2))
    graph.pinned.append(graph.top_features(1)[0].id)
    kept = client.annotate_attribution_graph(graph)
    assert kept.supernodes == graph.supernodes and kept.pinned == graph.pinned
    again = client.read_attribution_graph(graph.name)
    assert again.supernodes == graph.supernodes
    assert again.prune().to_viewer()["qParams"]["supernodes"] == [["first", *graph.supernodes[0].node_ids]]
    assert graph.name in [info.name for info in client.attribution_graphs()]
    pruned = again.prune()
    pruned.save(tmp_path / "graph.npz")
    loaded = AttributionGraph.load(tmp_path / "graph.npz")
    assert np.array_equal(loaded.kept, pruned.kept) and loaded.supernodes == pruned.supernodes
    client.delete_attribution_graph(graph.name)
    assert graph.name not in [info.name for info in client.attribution_graphs()]


def test_interventions_test_the_graphs_claims(model: Model, graph: AttributionGraph) -> None:
    chosen = [node for node in graph.prune().top_features(6) if node.position > 0]
    settings = [feature_setting(node.layer, node.feature or 0, node.position, 2.0) for node in chosen]
    held = model.intervene_on_features(graph, settings, tokens=[" she", " he"])
    assert held.predicted == pytest.approx(held.after - held.before, abs=1e-3), "edges are direct effects"
    assert held.feature_correlation == pytest.approx(1.0, abs=1e-6)
    known = [change for change in held.logits if not np.isnan(change.predicted)]
    assert known
    for change in known:
        assert change.measured == pytest.approx(change.predicted, abs=1e-3)
    opened = model.intervene_on_features(graph, settings, mode="open", max_tokens=6)
    assert opened.held_fixed.statement == "Nothing was held fixed."
    assert not np.allclose(opened.after - opened.before, opened.predicted, atol=1e-2)
    assert opened.text_before and opened.text_after
    plain = model.generate(CLEAN, max_tokens=6, temperature=0.0).result()
    assert opened.text_before == plain.text


def test_what_is_generated_under_settings_is_what_the_engine_makes_of_them(model: Model) -> None:
    from glasshouse.client import at, generated, set_feature

    settings = [feature_setting(3, 40, 15, 30.0)]
    found = model.intervene_on_features(CLEAN, settings, mode="open", max_tokens=8)
    edits = [
        set_feature("transcoder-3", 40, 30.0, positions=at([15])),
        set_feature("transcoder-3", 40, 30.0, positions=generated()),
    ]
    steered = model.generate(CLEAN, max_tokens=8, temperature=0.0, interventions=edits).result()
    assert found.text_after == steered.text


def test_connections_are_weights(model: Model, twin: GradientModel) -> None:
    found = model.feature_connections(3, 7, top=4)
    assert [len(found.incoming), len(found.outgoing)] == [4, 4]
    best = found.outgoing[0]
    first, later = (
        open_dictionaries("t", str(fable.dictionary_path(f"transcoder-{layer}")))[0]
        for layer in (3, best.layer)
    )
    written = first.decoder_rows(torch.tensor([7]))[0]
    assert best.weight == pytest.approx(
        float(later.encoder_rows(torch.tensor([best.feature]))[0] @ written), rel=1e-3
    )


def test_a_circuit_is_the_one_found_here(
    client: Client, model: Model, twin: GradientModel, ids: dict[str, Any]
) -> None:
    heard: list[Any] = []
    found = model.discover_circuit(CLEAN, CORRUPT, threshold=0.05).result(120, heard.append)
    ours = circuits.discover_circuit(twin, ids["clean"], ids["corrupt"], threshold=0.05)
    assert found.edges == [(str(source), str(end)) for source, end in ours.edges]
    assert found.faithfulness == pytest.approx(ours.faithfulness, abs=1e-3)
    assert client.circuit(found.name).edges == found.edges
    assert found.name in [circuit.name for circuit in client.circuits()]
    small = model.discover_circuit(CLEAN, CORRUPT, target_edges=6).result(120)
    assert len(small.edges) <= 6
    client.delete_circuit(found.name)
    assert found.name not in [circuit.name for circuit in client.circuits()]
    assert heard[-1].phase == "done" or heard[-1].fraction == 1.0


def test_an_estimate_bounds_what_comes(client: Client, model: Model, graph: AttributionGraph) -> None:
    found = model.estimate_attribution_graph(CLEAN)
    assert found.active_features == graph.info.n_active_features
    assert found.size >= graph.n_nodes and not found.refusal
    assert found.memory_bytes > 12 * graph.info.n_edges
    search = model.estimate_circuit(CLEAN, CORRUPT, threshold=0.1)
    assert search.passes_upper_bound >= search.size > 1000
    assert 0 < search.seconds <= search.seconds_upper_bound
    circuit = model.discover_circuit(CLEAN, CORRUPT, threshold=0.1).result(timeout=120)
    assert 0.5 < search.passes / circuit.n_passes < 2 < search.passes_upper_bound / circuit.n_passes
    client.delete_circuit(circuit.name)


async def test_the_asynchronous_client_gives_the_same(server: Any, model: Model) -> None:
    async with AsyncClient(server.target) as client:
        other = await client.model()
        sweep = other.patch_sweep(CLEAN, CORRUPT, metric=GENDER, grids="hook_mlp_out")
        results = [result async for result in sweep]
        whole = await sweep.result()
        same = model.patch_sweep(CLEAN, CORRUPT, metric=GENDER, grids="hook_mlp_out").result()
        assert len(results) == same.grid.values.size
        assert np.array_equal(whole.grid.values, same.grid.values)
        operation = await other.attribution_graph(CLEAN, max_feature_nodes=32)
        graph = await operation.result(120)
        assert len(graph.features) == 32
        assert (await client.read_attribution_graph(graph.name)).info == graph.info
        await client.delete_attribution_graph(graph.name)
